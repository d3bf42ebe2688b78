// The statistics of prefill on CUDA: tda::NeuronStats, tda::SelectMask, and the first half of tda::TailMean.
//
// TDA_BF16 says what an element is. All sums are float32, in an order that depends on sizes alone.

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSelectThreads = 1024;
constexpr float kTiny = 1e-30f;  // guards divisions whose numerator is zero too

static __device__ __forceinline__ float Square(float value) { return value * value; }

struct StatsArguments {
  const Element* h;            // [tokens, neurons]
  const bool* counted;         // [tokens]
  const float* past;           // [2, neurons]
  const float* decay;          // [1]
  const float* squared_norms;  // [neurons] or null
  float* token_weights;        // [tokens]: 1 / ||m(t)||^2, or 0 where a token does not count
  float* partial;              // [groups, 2, neurons]
  unsigned* arrived;           // [column blocks]: how many groups are done
  float* present;              // [2, neurons]
  int tokens, neurons, counters;
};

// One block a token: the squared length of its magnitudes.
template <int kWidth>
static __device__ __forceinline__ void TokenWeights(const StatsArguments& a) {
  __shared__ float sums[kWarps];
  WaitForEarlierKernels();
  LetNextKernelStart();
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < a.counters; i += gridDim.x * kThreads) a.arrived[i] = 0;
  const Element* h = a.h + static_cast<size_t>(blockIdx.x) * a.neurons;
  float sum = 0.0f;
#pragma unroll 4
  for (int at = threadIdx.x * kWidth; at < a.neurons; at += kThreads * kWidth) {
    float values[kWidth];
    Load<kWidth>(h + at).ToFloats(values);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      sum += Square(values[i]) * (a.squared_norms == nullptr ? 1.0f : a.squared_norms[at + i]);
    }
  }
  sum = WarpSum(sum);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float norm = 0.0f;
  for (int w = 0; w < kWarps; ++w) norm += sums[w];
  a.token_weights[blockIdx.x] = a.counted[blockIdx.x] && norm > 0.0f ? 1.0f / norm : 0.0f;
}

// A thread sums kWidth columns (blockIdx.x) over a group of tokens (blockIdx.y); the last group to arrive adds them up.
template <int kWidth>
static __device__ __forceinline__ void ColumnSums(const StatsArguments& a) {
  __shared__ bool last;
  const int column = (blockIdx.x * kThreads + threadIdx.x) * kWidth;
  const bool inside = column < a.neurons;
  const int first = static_cast<int>(static_cast<long long>(a.tokens) * blockIdx.y / gridDim.y);
  const int end = static_cast<int>(static_cast<long long>(a.tokens) * (blockIdx.y + 1) / gridDim.y);
  float scores[kWidth] = {}, sums[kWidth] = {};
  WaitForEarlierKernels();
  LetNextKernelStart();
  if (inside) {
#pragma unroll 8
    for (int t = first; t < end; ++t) {
      float values[kWidth];
      Load<kWidth>(a.h + static_cast<size_t>(t) * a.neurons + column).ToFloats(values);
      const float weight = a.token_weights[t];
      const bool counts = a.counted[t];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        // Chosen, not multiplied: a token that does not count may hold anything.
        scores[i] += weight > 0.0f ? weight * Square(values[i]) : 0.0f;
        sums[i] += counts ? values[i] : 0.0f;
      }
    }
    float* partial = a.partial + static_cast<size_t>(blockIdx.y) * 2 * a.neurons + column;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      partial[i] = scores[i];
      partial[a.neurons + i] = sums[i];
    }
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(&a.arrived[blockIdx.x], 1u) == gridDim.y - 1;
  __syncthreads();
  if (!last || !inside) return;
  __threadfence();
#pragma unroll
  for (int i = 0; i < kWidth; ++i) scores[i] = sums[i] = 0.0f;
#pragma unroll 4
  for (int group = 0; group < gridDim.y; ++group) {
    const float* partial = a.partial + static_cast<size_t>(group) * 2 * a.neurons + column;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      scores[i] += __ldcg(partial + i);
      sums[i] += __ldcg(partial + a.neurons + i);
    }
  }
  const float decay = *a.decay;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float score = a.squared_norms == nullptr ? scores[i] : scores[i] * a.squared_norms[column + i];
    a.present[column + i] = decay * a.past[column + i] + score;
    a.present[a.neurons + column + i] = decay * a.past[a.neurons + column + i] + sums[i];
  }
}

struct MaskArguments {
  const float* stats;      // [2, neurons]
  const float* weight;     // [1]
  const float* threshold;  // this layer's
  int* indices;            // [neurons]: the mask, ascending, then -1
  bool* keep;              // [neurons]
  int neurons;
};

// One block: every thread looks at a run of neurons, and the runs are put together by a prefix sum.
extern "C" __global__ void __launch_bounds__(kSelectThreads) SelectMask(MaskArguments a) {
  __shared__ int before_warp[kSelectThreads / kWarp];
  __shared__ int total;
  WaitForEarlierKernels();
  LetNextKernelStart();
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const float weight = *a.weight;
  const float safe_weight = fmaxf(weight, kTiny);
  const float threshold = *a.threshold;
  const int run = (a.neurons + kSelectThreads - 1) / kSelectThreads;
  const int first = min(threadIdx.x * run, a.neurons);
  const int end = min(first + run, a.neurons);
  int kept = 0;
  for (int i = first; i < end; ++i) {
    const bool keep = weight <= 0.0f || __fsqrt_rn(__fdiv_rn(a.stats[i], safe_weight)) >= threshold;
    a.keep[i] = keep;
    kept += keep;
  }
  int up_to = kept;  // kept by this thread and those before it in the warp
#pragma unroll
  for (int offset = 1; offset < kWarp; offset <<= 1) {
    const int other = __shfl_up_sync(0xffffffffu, up_to, offset);
    if (lane >= offset) up_to += other;
  }
  if (lane == kWarp - 1) before_warp[warp] = up_to;
  __syncthreads();
  if (threadIdx.x == 0) {
    int sum = 0;
    for (int w = 0; w < kSelectThreads / kWarp; ++w) {
      const int own = before_warp[w];
      before_warp[w] = sum;
      sum += own;
    }
    total = sum;
  }
  __syncthreads();
  int place = before_warp[warp] + up_to - kept;
  for (int i = first; i < end; ++i) {
    if (a.keep[i]) a.indices[place++] = i;
  }
  for (int i = total + threadIdx.x; i < a.neurons; i += kSelectThreads) a.indices[i] = -1;
}

struct TailArguments {
  const float* stats;   // [2, neurons]
  const float* weight;  // [1]
  const bool* keep;     // [neurons]
  float* h;             // [neurons]: mean activation of the dropped neurons, 0 of the others
  unsigned* arrived;    // [counters]
  int neurons, counters;
};

// What is to be summed; the second kernel of tda::IndexedFFN sums it.
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

extern "C" __global__ void __launch_bounds__(kThreads) TokenWeights_8(StatsArguments a) { TokenWeights<8>(a); }
extern "C" __global__ void __launch_bounds__(kThreads) TokenWeights_1(StatsArguments a) { TokenWeights<1>(a); }
extern "C" __global__ void __launch_bounds__(kThreads) ColumnSums_8(StatsArguments a) { ColumnSums<8>(a); }
extern "C" __global__ void __launch_bounds__(kThreads) ColumnSums_1(StatsArguments a) { ColumnSums<1>(a); }
