// tda::IndexedFFN on CUDA, in two kernels: activations of the mask's neurons, then the sum of their down rows.
//
// Compile-time constants: TDA_ACTIVATION (0 silu, 1 gelu, 2 gelu by tanh, 3 relu), TDA_GATED. Weights are neuron-major
// [F, M]. Everything is accumulated in float32, in an order that depends only on sizes, so that equal calls give equal
// results.

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
  LaunchBarrier ready;
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

// The mask's neurons as candidates for the sum of down rows.
template <int kTokens>
struct MaskedNeurons {
  struct Candidate {
    int row;
  };
  struct Given {};

  const FfnArguments& a;
  int first_token, tokens;
  bool every_row;

  __device__ __forceinline__ bool EveryRow() const { return every_row; }

  __device__ __forceinline__ Candidate Look(int k) const {
    const int neuron = k < 0 ? -1 : NeuronAt(a, k);
    return {static_cast<unsigned>(neuron) < static_cast<unsigned>(a.neurons) ? neuron : -1};
  }

  __device__ __forceinline__ Given Read(const Candidate&) const { return {}; }
  __device__ __forceinline__ void Complete() const {}

  __device__ __forceinline__ void Values(const Candidate& candidate, const Given&, int k, float (&values)[kTokens]) const {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const bool there = candidate.row >= 0 && t < tokens;
      values[t] = there ? a.h[static_cast<size_t>(first_token + t) * a.indices + k] : 0.0f;
    }
  }
};

// Sum h * down rows: kSlice columns (slice blockIdx.y) of a block's share of the rows for a tile of tokens (blockIdx.z).
template <int kTokens, class Format>
static __device__ __forceinline__ void DownSums(const FfnArguments& a) {
  constexpr int kWidth = Format::kWidth;
  __shared__ union {
    WarpRows<kTokens, Format> rows[kWarps];
    WarpSums<kTokens, kWidth, kWarps> sums;
  } shared;
  const int warp = threadIdx.x / kWarp;
  const int first_token = blockIdx.z * kTokens;
  const int tokens = min(kTokens, a.tokens - first_token);
  // Unless activations may be zero, the needed rows are known before the first kernel has ended.
  const bool every_row = TDA_ACTIVATION != 3 && (a.threshold == nullptr || *a.threshold <= 0.0f);
  const MaskedNeurons<kTokens> source = {a, first_token, tokens, every_row};
  const Format down = {a.down, a.hidden};
  float sums[kTokens][kWidth] = {};
  AddRows<kTokens>(source, down, a.indices, warp * gridDim.x + blockIdx.x, gridDim.x * kWarps,
                   blockIdx.y * kWarp * kWidth, shared.rows[warp], sums, [] { WaitForEarlierKernels(); });
  WaitForEarlierKernels();
  LetNextKernelStart();
  const Totals totals = {a.down_bias,
                         nullptr,
                         a.y,
                         nullptr,
                         static_cast<unsigned>(a.hidden),
                         static_cast<unsigned>(first_token),
                         static_cast<unsigned>(a.tokens)};
  __syncthreads();  // the rows give way to the sums
  AddBlocksInMemory<typename Format::Lanes>(sums, shared.sums, a.partial, a.arrived, totals);
}

#define TDA_KERNELS(tokens, width)                                                                              \
  extern "C" __global__ void __launch_bounds__(kThreads, tokens == 1 ? 2 : 1)                                   \
      Activations_##tokens##_##width(FfnArguments arguments) {                                                  \
    Activations<tokens, ElementFormat<width>>(arguments);                                                                      \
  }                                                                                                             \
  extern "C" __global__ void __launch_bounds__(kThreads, tokens == 1 ? 3 : 2)                                   \
      DownSums_##tokens##_##width(FfnArguments arguments) {                                                     \
    DownSums<tokens, ElementFormat<width>>(arguments);                                                                         \
  }

TDA_KERNELS(1, 8)
TDA_KERNELS(4, 8)
TDA_KERNELS(1, 1)
TDA_KERNELS(4, 1)
