// tda::IndexedFFN on CUDA, in two kernels: activations of the mask's neurons, then the sum of their down rows.
//
// Compile-time constants: TDA_ACTIVATION (0 silu, 1 gelu, 2 gelu by tanh, 3 relu), TDA_GATED. Weights are neuron-major
// [F, M]. Everything is accumulated in float32, in an order that depends on sizes alone, so that equal calls give equal
// results.

constexpr int kRowLoads = 8;      // the same of the second: one of each row
constexpr int kRowsTogether = 4;  // neighbours in mask_indices that go to the same warp of the second kernel

static __device__ __forceinline__ float Activate(float value) {
#if TDA_ACTIVATION == 0
  return value / (1.0f + __expf(-value));
#elif TDA_ACTIVATION == 1
  return 0.5f * value * (1.0f + erff(value * 0.70710678f));
#elif TDA_ACTIVATION == 2
  return 0.5f * value * (1.0f + tanhf(0.79788456f * (value + 0.044715f * value * value * value)));
#else
  return fmaxf(value, 0.0f);
#endif
}

struct FfnArguments {
  const Element* x;           // [tokens, M]
  const int* mask_indices;    // [indices], or null for all neurons in order
  const Element* gate;        // [neurons, M], null where not gated
  const Element* up;          // [neurons, M]
  const Element* down;        // [neurons, M]
  const Element* gate_bias;   // [neurons] or null
  const Element* up_bias;     // [neurons] or null
  const Element* down_bias;   // [M] or null
  const float* neuron_scale;  // [neurons] or null
  const float* threshold;     // this layer's, or null
  float* h;                   // [tokens, indices]: activations, 0 where there is nothing to add
  float* partial;             // [tiles, slices, groups, tokens of a tile, columns of a slice]
  unsigned* arrived;          // [counters], one for each tile and slice: groups that are done
  Element* y;                 // [tokens, M]
  int tokens, hidden, neurons, indices, counters;
  int early;  // 1: no kernel that may still run writes indices, weights, scales or thresholds
};

static __device__ __forceinline__ int NeuronAt(const FfnArguments& a, int k) {
  if (k >= a.indices) return -1;
  return a.mask_indices == nullptr ? k : a.mask_indices[k];
}

// One warp computes the activations of one neuron after another, for a tile of tokens (blockIdx.y).
template <int kTokens, class Format>
static __device__ __forceinline__ void Activations(const FfnArguments& a) {
  const int lane = threadIdx.x % kWarp;
  const int warp = (blockIdx.x * kThreads + threadIdx.x) / kWarp;
  const int warps = gridDim.x * kThreads / kWarp;
  const int first_token = blockIdx.y * kTokens;
  const int tokens = min(kTokens, a.tokens - first_token);
  const Element* x = a.x + static_cast<size_t>(first_token) * a.hidden;

  const Format up_matrix = {a.up, a.hidden};
#if TDA_GATED
  const Format gate_matrix = {a.gate, a.hidden};
#endif
  Gate ready;
  if (!a.early) ready();
  const float threshold = a.threshold == nullptr ? 0.0f : *a.threshold;
  int next = NeuronAt(a, warp);
  for (int k = warp; k < a.indices; k += warps) {
    const int neuron = next;
    next = NeuronAt(a, k + warps);
    float h[kTokens] = {};
    if (static_cast<unsigned>(neuron) < static_cast<unsigned>(a.neurons)) {
      const float up_bias = a.up_bias == nullptr ? 0.0f : ToFloat(a.up_bias[neuron]);
      const float scale = threshold > 0.0f ? a.neuron_scale[neuron] : 0.0f;
#if TDA_GATED
      const float gate_bias = a.gate_bias == nullptr ? 0.0f : ToFloat(a.gate_bias[neuron]);
      bool needed = true;
      float up[1][kTokens];
      if (threshold > 0.0f || TDA_ACTIVATION == 3) {  // the gate decides whether the up row is read
        float gate[1][kTokens];
        const typename Format::Row rows[1] = {gate_matrix.At(neuron)};
        Products<kTokens, Format, 1>(rows, x, a.hidden, tokens, lane, gate, ready);
        needed = false;
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          h[t] = Activate(gate[0][t] + gate_bias);
          if (threshold > 0.0f && fabsf(h[t]) * scale < threshold) h[t] = 0.0f;
          needed |= t < tokens && h[t] != 0.0f;
        }
        if (needed) {
          const typename Format::Row up_rows[1] = {up_matrix.At(neuron)};
          Products<kTokens, Format, 1>(up_rows, x, a.hidden, tokens, lane, up, ready);
        }
      } else {
        float both[2][kTokens];
        const typename Format::Row rows[2] = {gate_matrix.At(neuron), up_matrix.At(neuron)};
        Products<kTokens, Format, 2>(rows, x, a.hidden, tokens, lane, both, ready);
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          h[t] = Activate(both[0][t] + gate_bias);
          up[0][t] = both[1][t];
        }
      }
      if (needed) {
#pragma unroll
        for (int t = 0; t < kTokens; ++t) h[t] = h[t] == 0.0f ? 0.0f : h[t] * (up[0][t] + up_bias);
      }
#else
      float up[1][kTokens];
      const typename Format::Row rows[1] = {up_matrix.At(neuron)};
      Products<kTokens, Format, 1>(rows, x, a.hidden, tokens, lane, up, ready);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        h[t] = Activate(up[0][t] + up_bias);
        if (threshold > 0.0f && fabsf(h[t]) * scale < threshold) h[t] = 0.0f;
      }
#endif
    }
    ready();  // h may lie where an earlier kernel still reads
    if (lane == 0) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (t < tokens) a.h[static_cast<size_t>(first_token + t) * a.indices + k] = h[t];
      }
    }
  }
  ready();
  // The second kernel counts arrivals from zero.
  for (int i = (blockIdx.y * gridDim.x + blockIdx.x) * kThreads + threadIdx.x; i < a.counters;
       i += gridDim.x * gridDim.y * kThreads) {
    a.arrived[i] = 0;
  }
}

// Sum h * down rows. A warp sums kSlice columns (slice blockIdx.y) of every warps-th group of rows for a tile of tokens
// (blockIdx.z); the warps of a block are added in shared memory, and the blocks of a slice by the last one to arrive.
template <int kTokens, class Format>
static __device__ __forceinline__ void DownSums(const FfnArguments& a) {
  constexpr int kWidth = Format::kWidth;
  constexpr int kSlice = kWarp * kWidth;
  __shared__ float sums[kWarps][kTokens][kSlice];
  __shared__ bool last;
  const int lane = threadIdx.x % kWarp;
  const int warp_in_block = threadIdx.x / kWarp;
  const int warps = gridDim.x * kWarps;
  const int warp = warp_in_block * gridDim.x + blockIdx.x;
  // Lanes past the end of a row read its last columns, and their sums are thrown away.
  const int column = min(blockIdx.y * kSlice + lane * kWidth, a.hidden - kWidth);
  const int first_token = blockIdx.z * kTokens;
  const int tokens = min(kTokens, a.tokens - first_token);
  const int lane_offset = (lane / kRowsTogether * warps + warp) * kRowsTogether + lane % kRowsTogether;
  const int stride = warps * kWarp;

  // Unless activations may be zero, which rows are needed is known before the first kernel has ended, and the first of
  // them are under way meanwhile.
  const bool every_row = TDA_ACTIVATION != 3 && (a.threshold == nullptr || *a.threshold <= 0.0f);
  const Format down = {a.down, a.hidden};
  float accumulators[kTokens][kWidth] = {};
  int next = NeuronAt(a, lane_offset);
  for (int base = 0; base < a.indices; base += stride) {
    const int k = base + lane_offset;
    const int neuron = next;
    const bool valid = static_cast<unsigned>(neuron) < static_cast<unsigned>(a.neurons);
    float h[kTokens] = {};
    bool loaded = false;
    auto load_activations = [&] {
      WaitForEarlierKernels();
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (valid && t < tokens) h[t] = a.h[static_cast<size_t>(first_token + t) * a.indices + k];
      }
      loaded = true;
    };
    bool needed = valid;
    if (!every_row) {
      load_activations();
      needed = false;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) needed |= h[t] != 0.0f;
    }
    next = NeuronAt(a, k + stride);
    unsigned rows = __ballot_sync(0xffffffffu, needed);
    while (rows != 0) {
      decltype(down.At(0).Load(0)) weights[kRowLoads];
      // Where fewer rows are left than a batch holds, the first one is read again and counts for nothing.
      const int first = __ffs(rows) - 1;
      unsigned left = rows;
#pragma unroll
      for (int b = 0; b < kRowLoads; ++b) {
        const int source = left != 0 ? __ffs(left) - 1 : first;
        left &= left - 1;
        const int row = __shfl_sync(0xffffffffu, neuron, source);
        weights[b] = down.At(row).Load(column);
      }
      if (!loaded) load_activations();
#pragma unroll
      for (int b = 0; b < kRowLoads; ++b) {
        const int source = rows != 0 ? __ffs(rows) - 1 : first;
        const float count = rows != 0 ? 1.0f : 0.0f;
        rows &= rows - 1;
        float w[kWidth];
        weights[b].ToFloats(w);
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          const float scale = count * __shfl_sync(0xffffffffu, h[t], source);
#pragma unroll
          for (int i = 0; i < kWidth; ++i) accumulators[t][i] = fmaf(scale, w[i], accumulators[t][i]);
        }
      }
    }
  }
  WaitForEarlierKernels();
  LetNextKernelStart();

#pragma unroll
  for (int t = 0; t < kTokens; ++t)
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sums[warp_in_block][t][lane * kWidth + i] = accumulators[t][i];
  __syncthreads();
  const int cells = kTokens * kSlice;
  const size_t place = static_cast<size_t>(blockIdx.z) * gridDim.y + blockIdx.y;
  float* partial = a.partial + place * gridDim.x * cells;
  for (int cell = threadIdx.x; cell < cells; cell += kThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += (&sums[w][0][0])[cell];
    partial[static_cast<size_t>(blockIdx.x) * cells + cell] = sum;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(&a.arrived[place], 1u) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  for (int cell = threadIdx.x; cell < cells; cell += kThreads) {
    const int t = cell / kSlice;
    const int at = blockIdx.y * kSlice + cell % kSlice;
    if (t >= tokens || at >= a.hidden) continue;
    float sum = a.down_bias == nullptr ? 0.0f : ToFloat(a.down_bias[at]);
#pragma unroll 8
    for (int group = 0; group < gridDim.x; ++group) {
      sum += __ldcg(partial + static_cast<size_t>(group) * cells + cell);
    }
    a.y[static_cast<size_t>(first_token + t) * a.hidden + at] = FromFloat(sum);
  }
}

#define TDA_KERNELS(tokens, width)                                                                              \
  extern "C" __global__ void __launch_bounds__(kThreads, tokens == 1 ? 2 : 1)                                   \
      Activations_##tokens##_##width(FfnArguments arguments) {                                                  \
    Activations<tokens, ElementFormat<width>>(arguments);                                                                      \
  }                                                                                                             \
  extern "C" __global__ void __launch_bounds__(kThreads, tokens == 1 ? 2 : 1)                                   \
      DownSums_##tokens##_##width(FfnArguments arguments) {                                                     \
    DownSums<tokens, ElementFormat<width>>(arguments);                                                                         \
  }

TDA_KERNELS(1, 8)
TDA_KERNELS(4, 8)
TDA_KERNELS(1, 1)
TDA_KERNELS(4, 1)
