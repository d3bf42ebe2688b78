// tda::RowLinear, RowLinear4 and RowLinear8 on CUDA: y = sum over i of x[i] * w[i, :] + bias, over the rows that a token
// needs. Compile-time constants: TDA_BITS of a code, 0 where weights are elements, and TDA_CLUSTERS, whether the GPU has
// them.
//
// One launch. A token drops row i where x[i]^2 * row_price[i] < price, compared in float32; rows of zeros are never read.

struct RowLinearArguments {
  const Element* x;        // [tokens, inputs]
  StoredMatrix weight;     // [inputs, outputs]
  const float* row_price;  // [inputs]
  const float* price;      // [1]
  const Element* bias;     // [outputs] or null
  float* partial;          // [tiles, slices, groups, cells of a block]
  unsigned* arrived;       // [counters], one for each tile and slice: groups that are done; both without clusters only
  Element* y;              // [tokens, outputs]
  int tokens, inputs, outputs, counters;
  int early;  // 1: no kernel that may still run writes weight, row_price, price or bias; 0: it may write price
};

template <int kTokens>
struct PricedRows {
  struct Candidate {
    int row;
    float row_price;
  };

  const Element* x;  // [tokens, inputs]
  const float* row_price;
  const float& price;
  int tokens, inputs;
  bool every_row;

  __device__ __forceinline__ bool EveryRow() const { return every_row; }

  __device__ __forceinline__ Candidate Look(int k) const { return {k, k < 0 ? 0.0f : row_price[k]}; }

  __device__ __forceinline__ void Values(const Candidate& candidate, int, float (&values)[kTokens]) const {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      float value = 0.0f;
      if (candidate.row >= 0 && t < tokens) value = ToFloat(x[static_cast<size_t>(t) * inputs + candidate.row]);
      // Less, not its opposite: NaN is kept.
      values[t] = __fmul_rn(__fmul_rn(value, value), candidate.row_price) < price ? 0.0f : value;
    }
  }
};

// A block of kBlockWarps warps sums kSlice columns (slice blockIdx.y) of its share of the rows for a tile of tokens
// (blockIdx.z). With TDA_CLUSTERS the blocks of a slice are a cluster.
template <int kTokens, class Format, int kBlockWarps>
static __device__ __forceinline__ void RowLinear(const RowLinearArguments& a) {
  constexpr int kWidth = Format::kWidth;
  constexpr int kSlice = kWarp * kWidth;
  __shared__ union {
    WarpRows<kTokens, Format> rows[kBlockWarps];
    WarpSums<kTokens, kWidth, kBlockWarps> sums;
  } shared;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int first_token = blockIdx.z * kTokens;
  const int tokens = min(kTokens, a.tokens - first_token);
  // Lanes past the end of a row read its last columns, and their sums are thrown away.
  const int column = min(blockIdx.y * kSlice + lane * kWidth, a.outputs - kWidth);
#if TDA_CLUSTERS
  __shared__ ClusterSums<kTokens, kWidth> cluster_sums;
  cluster_sums.Begin();
#endif
  float price = a.early ? *a.price : 0.0f;
  const PricedRows<kTokens> source = {a.x + static_cast<size_t>(first_token) * a.inputs,
                                      a.row_price,
                                      price,
                                      tokens,
                                      a.inputs,
                                      a.early && !(price > 0.0f)};
  bool passed = false;
  const auto ready = [&] {
    if (passed) return;
    passed = true;
    WaitForEarlierKernels();
    LetNextKernelStart();
    if (!a.early) price = *a.price;
  };
  const Format weight(a.weight);
  float sums[kTokens][kWidth] = {};
  AddRows<kTokens>(source, weight, a.inputs, warp * gridDim.x + blockIdx.x, gridDim.x * kBlockWarps, column,
                   shared.rows[warp], sums, ready);
  const Totals totals = {a.bias, a.y + static_cast<size_t>(first_token) * a.outputs, a.outputs, tokens};
  __syncthreads();  // the rows give way to the sums
#if TDA_CLUSTERS
  AddBlocksInCluster(sums, shared.sums, cluster_sums, totals);
#else
  AddBlocksInMemory(sums, shared.sums, a.partial, a.arrived, totals);
#endif
}

#if TDA_BITS
#define TDA_ROW_FORMAT(width) CodeFormat<TDA_BITS, width * TDA_BITS / 32>
#else
#define TDA_ROW_FORMAT(width) ElementFormat<width>
#endif

// `blocks` on a multiprocessor at once leave so many registers that a warp has all its loads under way together.
#define TDA_ROW_LINEAR(tokens, width, warps, blocks)                                    \
  extern "C" __global__ void __launch_bounds__(warps* kWarp, blocks)                    \
      RowLinear_##tokens##_##width##_##warps##_##blocks(RowLinearArguments arguments) { \
    RowLinear<tokens, TDA_ROW_FORMAT(width), warps>(arguments);                         \
  }

#if TDA_BITS == 4
TDA_ROW_LINEAR(1, 32, 8, 2)
TDA_ROW_LINEAR(1, 16, 8, 2)
#else
TDA_ROW_LINEAR(1, 8, 8, 3)
TDA_ROW_LINEAR(1, 8, 8, 2)
#endif
TDA_ROW_LINEAR(1, 8, 16, 1)
TDA_ROW_LINEAR(4, 8, 8, 1)
TDA_ROW_LINEAR(1, 1, 8, 3)
TDA_ROW_LINEAR(4, 1, 8, 1)

#if !TDA_CLUSTERS
// Set the counters to zero, ahead of the kernel that counts arrivals.
extern "C" __global__ void ClearCounters(RowLinearArguments a) {
  WaitForEarlierKernels();
  for (int i = threadIdx.x; i < a.counters; i += blockDim.x) a.arrived[i] = 0;
}
#endif
