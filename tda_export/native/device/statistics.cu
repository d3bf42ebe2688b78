// The statistics of prefill on CUDA: tda::NeuronStats, tda::SelectMask, and the first half of tda::TailMean.
//
// TDA_BF16 selects the element type. All sums are float32, in an order that depends only on sizes.

constexpr int kSelectThreads = 1024;
constexpr float kTiny = 1e-30f;  // guards divisions whose numerator is zero too

static __device__ __forceinline__ float Square(float value) { return value * value; }

struct StatsArguments {
  const Element* h;            // [tokens, neurons]
  const bool* counted;         // [tokens]
  const float* past;           // [2, neurons]
  const float* decay;          // [1]
  const float* squared_norms;  // [neurons] or null
  float* partial;              // [groups, 2, neurons]
  float* present;              // [2, neurons]
  int tokens, neurons, groups;
};

constexpr int kGroupThreads = 1024;
constexpr int kGroupWarps = kGroupThreads / kWarp;
constexpr int kGroupTokens = 8;  // of one block

// One block sums kGroupTokens tokens. It reads them twice, first for the length of each token's magnitudes, then for the
// sums that these lengths weigh; the second time they come from the cache.
template <int kWidth>
static __device__ __forceinline__ void GroupSums(const StatsArguments& a) {
  __shared__ float parts[kGroupTokens][kGroupWarps];
  __shared__ float token_weights[kGroupTokens];  // 1 / ||m(t)||^2, or 0 where a token does not count
  __shared__ bool counts[kGroupTokens];
  const int first = blockIdx.x * kGroupTokens;
  const int tokens = min(kGroupTokens, a.tokens - first);
  const Element* h = a.h + static_cast<size_t>(first) * a.neurons;
  WaitForEarlierKernels();
  LetNextKernelStart();
  float lengths[kGroupTokens] = {};
  for (int at = threadIdx.x * kWidth; at < a.neurons; at += kGroupThreads * kWidth) {
    Pack<kWidth> packs[kGroupTokens];
#pragma unroll
    for (int t = 0; t < kGroupTokens; ++t) {
      packs[t] = Load<kWidth>(h + static_cast<size_t>(min(t, tokens - 1)) * a.neurons + at);
    }
    float norms[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) norms[i] = a.squared_norms == nullptr ? 1.0f : a.squared_norms[at + i];
#pragma unroll
    for (int t = 0; t < kGroupTokens; ++t) {
      float values[kWidth];
      packs[t].ToFloats(values);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) lengths[t] += Square(values[i]) * norms[i];
    }
  }
#pragma unroll
  for (int t = 0; t < kGroupTokens; ++t) {
    const float length = WarpSum(lengths[t]);
    if (threadIdx.x % kWarp == 0) parts[t][threadIdx.x / kWarp] = length;
  }
  __syncthreads();
  if (threadIdx.x / kWarp < kGroupTokens) {
    const int t = threadIdx.x / kWarp;  // one warp a token
    const float length = WarpSum(parts[t][threadIdx.x % kWarp]);
    if (threadIdx.x % kWarp == 0) {
      counts[t] = t < tokens && a.counted[first + min(t, tokens - 1)];
      token_weights[t] = counts[t] && length > 0.0f ? 1.0f / length : 0.0f;
    }
  }
  __syncthreads();
  for (int at = threadIdx.x * kWidth; at < a.neurons; at += kGroupThreads * kWidth) {
    float scores[kWidth] = {}, sums[kWidth] = {};
#pragma unroll
    for (int t = 0; t < kGroupTokens; ++t) {
      float values[kWidth];
      Load<kWidth>(h + static_cast<size_t>(min(t, tokens - 1)) * a.neurons + at).ToFloats(values);
      const float weight = token_weights[t];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        // Selected instead of multiplied, since a token that does not count may hold any values.
        scores[i] += weight > 0.0f ? weight * Square(values[i]) : 0.0f;
        sums[i] += counts[t] ? values[i] : 0.0f;
      }
    }
    float* partial = a.partial + static_cast<size_t>(blockIdx.x) * 2 * a.neurons + at;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      partial[i] = scores[i];
      partial[a.neurons + i] = sums[i];
    }
  }
}

// One thread adds up the groups of one number of the result.
extern "C" __global__ void __launch_bounds__(kThreads) PresentStats(StatsArguments a) {
  WaitForEarlierKernels();
  LetNextKernelStart();
  const int at = blockIdx.x * kThreads + threadIdx.x;
  if (at >= 2 * a.neurons) return;
  float sum = 0.0f;
#pragma unroll 16
  for (int group = 0; group < a.groups; ++group) sum += a.partial[static_cast<size_t>(group) * 2 * a.neurons + at];
  if (a.squared_norms != nullptr && at < a.neurons) sum *= a.squared_norms[at];
  a.present[at] = *a.decay * a.past[at] + sum;
}

struct MaskArguments {
  const float* stats;      // [2, neurons]
  const float* weight;     // [1]
  const float* threshold;  // this layer's
  int* indices;            // [neurons]: the mask, ascending, then -1
  bool* keep;              // [neurons]
  int neurons;
};

constexpr int kSelectWarps = kSelectThreads / kWarp;
constexpr int kRounds = 12;  // neurons of a thread that are looked at together

// One block. A thread looks at every kSelectThreads-th neuron, so that a warp's 32 lie side by side and one vote puts them
// in order; the votes of all warps and rounds are added up in order by the first warp.
extern "C" __global__ void __launch_bounds__(kSelectThreads) SelectMask(MaskArguments a) {
  __shared__ int before[kRounds * kSelectWarps];  // kept before each vote
  __shared__ int total;
  WaitForEarlierKernels();
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const float weight = *a.weight;
  const float safe_weight = fmaxf(weight, kTiny);
  const float threshold = *a.threshold;
  int start = 0;  // kept so far
  for (int base = 0; base < a.neurons; base += kRounds * kSelectThreads) {
    float scores[kRounds];
    unsigned votes[kRounds];
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int i = base + r * kSelectThreads + threadIdx.x;
      scores[r] = i < a.neurons ? a.stats[i] : 0.0f;
    }
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int i = base + r * kSelectThreads + threadIdx.x;
      const bool reaches = __fsqrt_rn(__fdiv_rn(scores[r], safe_weight)) >= threshold;
      const bool keep = i < a.neurons && (weight <= 0.0f || reaches);
      if (i < a.neurons) a.keep[i] = keep;
      votes[r] = __ballot_sync(0xffffffffu, keep);
      if (lane == 0) before[r * kSelectWarps + warp] = __popc(votes[r]);
    }
    __syncthreads();
    if (warp == 0) {
      int carried = start;
      for (int r = 0; r < kRounds; ++r) {
        const int own = before[r * kSelectWarps + lane];
        int up_to = own;
#pragma unroll
        for (int offset = 1; offset < kWarp; offset <<= 1) {
          const int other = __shfl_up_sync(0xffffffffu, up_to, offset);
          if (lane >= offset) up_to += other;
        }
        before[r * kSelectWarps + lane] = carried + up_to - own;
        carried += __shfl_sync(0xffffffffu, up_to, kWarp - 1);
      }
      if (lane == 0) total = carried;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int i = base + r * kSelectThreads + threadIdx.x;
      if (votes[r] >> lane & 1u) a.indices[before[r * kSelectWarps + warp] + __popc(votes[r] & ((1u << lane) - 1u))] = i;
    }
    start = total;
    __syncthreads();
  }
  for (int i = start + threadIdx.x; i < a.neurons; i += kSelectThreads) a.indices[i] = -1;
}

struct TailArguments {
  const float* stats;   // [2, neurons]
  const float* weight;  // [1]
  const bool* keep;     // [neurons]
  float* h;             // [neurons]: mean activation of the dropped neurons, 0 of the others
  unsigned* arrived;    // [counters]
  int neurons, counters;
};

// The rows to be summed; the second kernel of tda::IndexedFFN sums them.
extern "C" __global__ void __launch_bounds__(kThreads) TailActivations(TailArguments a) {
  WaitForEarlierKernels();
  LetNextKernelStart();
  const int at = blockIdx.x * kThreads + threadIdx.x;
  for (int i = at; i < a.counters; i += gridDim.x * kThreads) a.arrived[i] = 0;
  const float weight = fmaxf(*a.weight, kTiny);
  for (int i = at; i < a.neurons; i += gridDim.x * kThreads) {
    a.h[i] = a.keep[i] ? 0.0f : a.stats[a.neurons + i] / weight;
  }
}

extern "C" __global__ void __launch_bounds__(kGroupThreads, 1) GroupSums_8(StatsArguments a) { GroupSums<8>(a); }
extern "C" __global__ void __launch_bounds__(kGroupThreads, 1) GroupSums_1(StatsArguments a) { GroupSums<1>(a); }
