// tda::RowLinear, RowLinear4 and RowLinear8 on CUDA: y = sum over i of x[i] * w[i, :] + bias, over the rows that a token
// needs; and, of one token, NormRowLinear, RmsRowLinear and GatedRowLinear with their forms, whose x is a norm or a gated
// activation that every block makes for itself. With a residual, y is the residual plus that, and `squares` is what a norm
// of y needs. Compile-time constants: TDA_BITS of a code, 0 where weights are elements, TDA_CLUSTERS, whether the GPU has
// them, TDA_INPUTS, where x comes from: 0 stored, 1 a norm, 2 a gated activation, 3 a norm whose squares are given, and for
// a gated activation TDA_ACTIVATION (device/activation.cuh).
//
// One launch. A token drops row i where x[i]^2 * row_price[i] < price, compared in float32; rows of zeros are never read.

struct RowLinearArguments {
  const Element* x;        // [tokens, inputs]; of a gated activation the gate
  StoredMatrix weight;     // [inputs, outputs]
  const float* row_price;  // [inputs]
  const float* price;      // [1]
  const Element* bias;     // [outputs] or null
  float* partial;          // [tiles, slices, groups, cells of a block]
  unsigned* arrived;       // [counters], one for each tile and slice: groups that are done; both without clusters only
  Element* y;              // [tokens, outputs]
  int tokens, inputs, outputs, counters;
  int early;  // 1: no kernel that may still run writes weight, row_price, price or bias; 0: it may write price
  const Element* residual;  // [tokens, outputs] or null
  float* squares;           // [tokens, SquareParts(outputs)] of y, or null
#if TDA_INPUTS
  const Element* other;  // [inputs]: what a norm adds to x, or the up of a gated activation
  const Element* norm_weight;  // [inputs]; written by no kernel that may still run
  Element* sum;                // [inputs]: x + other
  const float* x_squares;      // [SquareParts(inputs)] of x
  float epsilon;
  int wide;  // whether AddNorm would use wide loads
#endif
};

// Inputs say what x is: `Known` is what can be read of a row before earlier kernels have ended, and `Given` what is read
// after them, ahead of Value. All threads of a block call Make() between, and Complete() between Read and Value. A row
// of -1 has the value 0.
#if TDA_INPUTS == 0
struct Inputs {
  struct Known {};
  struct Given {};

  __device__ __forceinline__ Inputs(const RowLinearArguments& a, int first_token)
      : x(a.x + static_cast<size_t>(first_token) * a.inputs), inputs(a.inputs) {}

  __device__ __forceinline__ Known Look(int) const { return {}; }
  template <int kBlockWarps>
  __device__ __forceinline__ void Make() {}
  __device__ __forceinline__ void Complete() {}
  __device__ __forceinline__ Given Read(int) const { return {}; }
  __device__ __forceinline__ float Value(int row, const Known&, const Given&, int t, int tokens) const {
    float value = 0.0f;
    if (row >= 0 && t < tokens) value = ToFloat(x[static_cast<size_t>(t) * inputs + row]);
    return value;
  }

  const Element* x;
  const int inputs;
};
#elif TDA_INPUTS == 1
struct Inputs {
  using Known = float;  // the weight
  struct Given {
    Pack<1> x, other;
  };

  __device__ __forceinline__ Inputs(const RowLinearArguments& a, int) : a(a) {}

  __device__ __forceinline__ Known Look(int row) const { return row < 0 ? 0.0f : ToFloat(a.norm_weight[row]); }

  // Add the squares as AddNorm does, and store a part of the sum.
  template <int kBlockWarps>
  __device__ __forceinline__ void Make() {
    __shared__ float squares[kNormWarps];
    if (a.wide) {
      AddSquares<8, kBlockWarps>(squares);
    } else {
      AddSquares<1, kBlockWarps>(squares);
    }
    __syncthreads();
    scale = NormScale(squares, a.inputs, a.epsilon);
  }
  __device__ __forceinline__ void Complete() {}

  __device__ __forceinline__ Given Read(int row) const {
    if (row < 0) return {};
    return {Load<1>(a.x + row), Load<1>(a.other + row)};
  }

  __device__ __forceinline__ float Value(int row, const Known& weight, const Given& given, int, int) const {
    const float none = 0.0f;
    float sum;
    RoundSums(given.x, given.other, &none, &sum);
    return row < 0 ? 0.0f : ToFloat(FromFloat(Normed(weight, sum, scale)));
  }

  // A thread plays those of AddNorm that are whole blocks of this kernel apart.
  template <int kWidth, int kBlockWarps>
  __device__ __forceinline__ void AddSquares(float (&squares)[kNormWarps]) const {
    constexpr int kBlockThreads = kBlockWarps * kWarp;
    constexpr int kPlayed = kNormThreads / kBlockThreads;
    static_assert(kPlayed * kBlockThreads == kNormThreads, "all of them are played");
    const float none[kWidth] = {};
    float sums[kWidth], played[kPlayed] = {};
#pragma unroll 2
    for (int first = threadIdx.x * kWidth; first < a.inputs; first += kNormThreads * kWidth) {
      Pack<kWidth> x[kPlayed], other[kPlayed];
#pragma unroll
      for (int p = 0; p < kPlayed; ++p) {
        const int at = first + p * kBlockThreads * kWidth;
        if (at >= a.inputs) break;
        x[p] = Load<kWidth>(a.x + at);
        other[p] = Load<kWidth>(a.other + at);
      }
#pragma unroll
      for (int p = 0; p < kPlayed; ++p) {
        if (first + p * kBlockThreads * kWidth >= a.inputs) break;
        played[p] += RoundSums(x[p], other[p], none, sums);
      }
    }
#pragma unroll
    for (int p = 0; p < kPlayed; ++p) {
      const float square = WarpSum(played[p]);
      if (threadIdx.x % kWarp == 0) squares[p * kBlockWarps + threadIdx.x / kWarp] = square;
    }
    // Stores amid the loads above would hold those up.
    const int block = blockIdx.y * gridDim.x + blockIdx.x, blocks = gridDim.y * gridDim.x;
    for (int at = (block * kBlockThreads + threadIdx.x) * kWidth; at < a.inputs; at += blocks * kBlockThreads * kWidth) {
      RoundSums(Load<kWidth>(a.x + at), Load<kWidth>(a.other + at), none, sums);
      Store<kWidth>(a.sum + at, sums);
    }
  }

  const RowLinearArguments& a;
  float scale = 0.0f;
};
#elif TDA_INPUTS == 3
struct Inputs {
  using Known = float;  // the weight
  using Given = Element;

  __device__ __forceinline__ Inputs(const RowLinearArguments& a, int) : a(a) {}

  __device__ __forceinline__ Known Look(int row) const { return row < 0 ? 0.0f : ToFloat(a.norm_weight[row]); }

  // Every warp adds all squares, so no thread waits for another warp's; and rows are read before they are there.
  template <int kBlockWarps>
  __device__ __forceinline__ void Make() {
    squares.Read(a.x_squares, a.inputs);
  }
  __device__ __forceinline__ void Complete() { scale = squares.Scale(a.x_squares, a.inputs, a.epsilon); }

  __device__ __forceinline__ Given Read(int row) const { return row < 0 ? Element() : a.x[row]; }

  __device__ __forceinline__ float Value(int row, const Known& weight, const Given& given, int, int) const {
    return row < 0 ? 0.0f : ToFloat(FromFloat(Normed(weight, ToFloat(given), scale)));
  }

  const RowLinearArguments& a;
  GivenSquares squares;
  float scale = 0.0f;
};
#else
struct Inputs {
  struct Known {};
  struct Given {
    Element gate, up;
  };

  __device__ __forceinline__ Inputs(const RowLinearArguments& a, int) : gate(a.x), up(a.other) {}

  __device__ __forceinline__ Known Look(int) const { return {}; }
  template <int kBlockWarps>
  __device__ __forceinline__ void Make() {}
  __device__ __forceinline__ void Complete() {}
  __device__ __forceinline__ Given Read(int row) const {
    if (row < 0) return {};
    return {gate[row], up[row]};
  }
  __device__ __forceinline__ float Value(int row, const Known&, const Given& given, int, int) const {
    // No branch: of a row of -1 both are 0, and so is their product.
    return ToFloat(FromFloat(Gated(ToFloat(given.gate), ToFloat(given.up))));
  }

  const Element* gate;
  const Element* up;
};
#endif

template <int kTokens>
struct PricedRows {
  struct Candidate {
    int row;
    float row_price;
    Inputs::Known known;
  };
  using Given = Inputs::Given;

  Inputs& inputs;
  const float* row_price;
  const float& price;
  int tokens;
  bool every_row;

  __device__ __forceinline__ bool EveryRow() const { return every_row; }

  __device__ __forceinline__ Candidate Look(int k) const {
    return {k, k < 0 ? 0.0f : row_price[k], inputs.Look(k)};
  }

  __device__ __forceinline__ Given Read(const Candidate& candidate) const { return inputs.Read(candidate.row); }

  __device__ __forceinline__ void Complete() const { inputs.Complete(); }

  __device__ __forceinline__ void Values(const Candidate& candidate, const Given& given, int,
                                         float (&values)[kTokens]) const {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const float value = inputs.Value(candidate.row, candidate.known, given, t, tokens);
      // Less, not its opposite: NaN is kept.
      values[t] = __fmul_rn(__fmul_rn(value, value), candidate.row_price) < price ? 0.0f : value;
    }
  }
};

// What comes before values are read, once: the end of earlier kernels, and what could not be read before it.
template <int kBlockWarps>
struct InputsReady {
  __device__ __forceinline__ void operator()() {
    if (passed) return;
    passed = true;
    WaitForEarlierKernels();
    LetNextKernelStart();
    if (!a.early) price = *a.price;
    inputs.Make<kBlockWarps>();
  }

  const RowLinearArguments& a;
  float& price;
  Inputs& inputs;
  bool passed = false;
};

// A block of kBlockWarps warps sums kSlice columns (slice blockIdx.y) of its share of the rows for a tile of tokens
// (blockIdx.z). With TDA_CLUSTERS the blocks of a slice are a cluster.
template <int kTokens, class Format, int kBlockWarps>
static __device__ __forceinline__ void RowLinear(const RowLinearArguments& a) {
  constexpr int kWidth = Format::kWidth;
  constexpr int kSlice = kWarp * kWidth;
  union Shared {
    WarpRows<kTokens, Format> rows[kBlockWarps];
    WarpSums<kTokens, kWidth, kBlockWarps> sums;
  };
  Shared& shared = BlockMemory<Shared, Format::kRowsBy == RowsBy::kMatrices>();
  const int warp = threadIdx.x / kWarp;
  const int first_token = kTokens == 1 ? 0 : blockIdx.z * kTokens;  // one token has a kernel of its own
  const int tokens = min(kTokens, a.tokens - first_token);
#if TDA_CLUSTERS
  __shared__ ClusterSums<kTokens, kWidth> cluster_sums;
  cluster_sums.Begin();
#endif
  float price = a.early ? *a.price : 0.0f;
  Inputs inputs(a, first_token);
  const PricedRows<kTokens> source = {inputs, a.row_price, price, tokens, a.early && !(price > 0.0f)};
  InputsReady<kBlockWarps> ready = {a, price, inputs};
  const Format weight(a.weight);
  float sums[kTokens][kWidth] = {};
  AddRows<kTokens>(source, weight, a.inputs, warp * gridDim.x + blockIdx.x, gridDim.x * kBlockWarps,
                   blockIdx.y * kSlice, shared.rows[warp], sums, ready);
  const Totals totals = {a.bias,
                         a.residual,
                         a.y,
                         a.squares,
                         static_cast<unsigned>(a.outputs),
                         static_cast<unsigned>(first_token),
                         static_cast<unsigned>(a.tokens)};
  __syncthreads();  // the rows give way to the sums
#if TDA_CLUSTERS
  AddBlocksInCluster<typename Format::Lanes>(sums, shared.sums, cluster_sums, totals);
#else
  AddBlocksInMemory<typename Format::Lanes>(sums, shared.sums, a.partial, a.arrived, totals);
#endif
}

#if TDA_HALF_CODES && TDA_CLUSTERS
// One token, by blocks that stay (device/row_whole_slices.cuh). Shared memory: rows under way, received sums, and each
// share's list. A cluster has at least two blocks.
template <class Format, int kBlockWarps>
static __device__ __forceinline__ void RowLinearWhole(const RowLinearArguments& a) {
  using Whole = WholeSlices<Format, kBlockWarps>;
  using Sums = typename Whole::Sums;
  using Slots = typename Sums::Slot[kBlockWarps][Format::kSlots];
  constexpr unsigned kSlice = kWarp * Format::kWidth;
  TDA_DYNAMIC_MEMORY(memory);
  __shared__ typename Whole::Counts counts;
  __shared__ ClusterInbox inbox;
  const typename Whole::Shares own(a.outputs / kSlice, a.inputs);
  const WholeTotals<Format, kBlockWarps> whole_totals(own, reinterpret_cast<float*>(memory + sizeof(Slots)), inbox);
  int* const rows = reinterpret_cast<int*>(whole_totals.received + whole_totals.Room());
  unsigned short* const values = reinterpret_cast<unsigned short*>(rows + own.parts * own.room);
  const Whole whole = {own, counts, rows + own.part * own.room, values + own.part * own.room,
                       reinterpret_cast<Slots&>(*memory)[threadIdx.x / kWarp]};
  // As in RowLinear, but that no row is read before it is known which are needed: that gained nothing.
  float price = a.early ? *a.price : 0.0f;
  Inputs inputs(a, 0);
  const PricedRows<1> source = {inputs, a.row_price, price, 1, false};
  InputsReady<kBlockWarps> ready = {a, price, inputs};
  const Format weight(a.weight);
  const auto column = weight.From((own.first_slice + own.slice) * kSlice);
  float sums[1][Format::kWidth] = {};
  const int listed_rows = whole.List(source, ready);
  if (own.Adds()) whole.Add(Sums{column, sums}, listed_rows);
  whole_totals.Store(sums, {a.bias, a.residual, a.y, a.squares, static_cast<unsigned>(a.outputs), 0, 1});
}
#endif

#if TDA_BITS
#define TDA_ROW_FORMAT(width) CodeFormat<TDA_BITS, width * TDA_BITS / 32>
#else
#define TDA_ROW_FORMAT(width) ElementFormat<width>
#endif

// `blocks` on a multiprocessor at once leave so many registers that a warp has all its loads under way together.
#define TDA_ROW_LINEAR_OF(tokens, width, warps, blocks, Format)                         \
  extern "C" __global__ void __launch_bounds__(warps* kWarp, blocks)                    \
      RowLinear_##tokens##_##width##_##warps##_##blocks(RowLinearArguments arguments) { \
    RowLinear<tokens, Format, warps>(arguments);                                        \
  }
#define TDA_ROW_LINEAR(tokens, width, warps, blocks) \
  TDA_ROW_LINEAR_OF(tokens, width, warps, blocks, TDA_ROW_FORMAT(width))

#if TDA_BITS == 4
TDA_ROW_LINEAR(1, 32, 8, 2)
TDA_ROW_LINEAR(1, 16, 8, 2)
#else
TDA_ROW_LINEAR(1, 8, 8, 3)
TDA_ROW_LINEAR(1, 8, 8, 2)
#endif
TDA_ROW_LINEAR(1, 8, 16, 1)
TDA_ROW_LINEAR(1, 1, 8, 3)
#if TDA_HALF_CODES
// By matrices of rows, with so many of them under way in a warp.
#if TDA_BITS == 4
using SmallBlocks = CodeMatrixFormat<TDA_BITS, 2>;
using LargeBlocks = CodeMatrixFormat<TDA_BITS, 3>;
#else
using SmallBlocks = CodeMatrixFormat<TDA_BITS, 1>;
using LargeBlocks = CodeMatrixFormat<TDA_BITS, 2>;
#endif
TDA_ROW_LINEAR_OF(1, small, 8, 3, SmallBlocks)
TDA_ROW_LINEAR_OF(1, large, 16, 1, LargeBlocks)
#if TDA_CLUSTERS
extern "C" __global__ void __launch_bounds__(16 * kWarp, 1) RowLinear_1_whole_16_1(RowLinearArguments arguments) {
  RowLinearWhole<SmallBlocks, 16>(arguments);
}
#endif
#endif
#if !TDA_INPUTS
TDA_ROW_LINEAR(4, 8, 8, 1)
TDA_ROW_LINEAR(4, 1, 8, 1)
#endif

#if !TDA_CLUSTERS
// Set the counters to zero, ahead of the kernel that counts arrivals.
extern "C" __global__ void ClearCounters(RowLinearArguments a) {
  WaitForEarlierKernels();
  for (int i = threadIdx.x; i < a.counters; i += blockDim.x) a.arrived[i] = 0;
}
#endif
