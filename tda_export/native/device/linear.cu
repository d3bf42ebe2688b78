// tda::Linear, Linear4, Linear8 and tda::AddNorm on CUDA: products with output-major matrices, and norms, for few tokens
// at a time. Compile-time constant: TDA_BITS of a code, 0 where weights are elements.

struct LinearArguments {
  const Element* x;       // [tokens, inputs]
  StoredMatrix weight;    // [outputs, inputs]
  Element* y;             // [tokens, outputs]
  int tokens, inputs, outputs;
  int early;  // 1: no kernel that may still run writes the weight
};

constexpr int kRowsAtOnce = 2;  // of a warp

// One warp multiplies two rows after two others with a tile of tokens (blockIdx.y).
template <int kTokens, class Format>
static __device__ __forceinline__ void Linear(const LinearArguments& a) {
  const int lane = threadIdx.x % kWarp;
  const int warp = (blockIdx.x * kThreads + threadIdx.x) / kWarp;
  const int warps = gridDim.x * kThreads / kWarp;
  const int first_token = blockIdx.y * kTokens;
  const int tokens = min(kTokens, a.tokens - first_token);
  const Element* x = a.x + static_cast<size_t>(first_token) * a.inputs;
  const Format weight(a.weight);
  LaunchBarrier ready;
  if (!a.early) ready();
  for (int row = warp * kRowsAtOnce; row < a.outputs; row += warps * kRowsAtOnce) {
    // An odd number of rows: the last one is multiplied twice and stored once.
    const int second = min(row + 1, a.outputs - 1);
    const typename Format::Row rows[kRowsAtOnce] = {weight.At(row), weight.At(second)};
    float sums[kRowsAtOnce][kTokens];
    Products<kTokens, Format, kRowsAtOnce>(rows, x, a.inputs, tokens, lane, sums, ready);
    if (lane != 0) continue;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (t >= tokens) break;
      Element* y = a.y + static_cast<size_t>(first_token + t) * a.outputs;
      y[row] = FromFloat(sums[0][t]);
      if (second != row) y[second] = FromFloat(sums[1][t]);
    }
  }
  ready();
}

struct AddNormArguments {
  const Element* x;         // [tokens, hidden]
  const Element* residual;  // [tokens, hidden]
  const Element* bias;      // [hidden] or null
  const Element* weight;    // [hidden]
  Element* normed;          // [tokens, hidden]
  Element* sum;             // [tokens, hidden]
  int hidden;
  float epsilon;
  int early;  // 1: no kernel that may still run writes weight or bias
};

constexpr int kHeld = 2;  // packs of a row that a thread keeps in registers; the rest of a longer row is read again

// Store the rounded sums of a pack, and return their squares' sum.
template <int kWidth>
static __device__ __forceinline__ float AddPack(const AddNormArguments& a, size_t row, int at, const float* bias,
                                                float* sums) {
  const float square = RoundSums(Load<kWidth>(a.x + row + at), Load<kWidth>(a.residual + row + at), bias, sums);
  Store<kWidth>(a.sum + row + at, sums);
  return square;
}

// RMS norm of x + residual + bias, and that sum: one block a token.
template <int kWidth>
static __device__ __forceinline__ void AddNorm(const AddNormArguments& a) {
  __shared__ float squares[kNormWarps];
  const size_t row = static_cast<size_t>(blockIdx.x) * a.hidden;
  const int stride = kNormThreads * kWidth;
  const int first = threadIdx.x * kWidth;
  LaunchBarrier ready;
  if (!a.early) ready();
  Pack<kWidth> weights[kHeld];
  float bias[kHeld][kWidth] = {}, held[kHeld][kWidth];
#pragma unroll
  for (int p = 0; p < kHeld; ++p) {
    if (first + p * stride >= a.hidden) break;
    weights[p] = Load<kWidth>(a.weight + first + p * stride);
    if (a.bias != nullptr) Load<kWidth>(a.bias + first + p * stride).ToFloats(bias[p]);
  }
  ready();
  float square = 0.0f;
#pragma unroll
  for (int p = 0; p < kHeld; ++p) {
    if (first + p * stride >= a.hidden) break;
    square += AddPack<kWidth>(a, row, first + p * stride, bias[p], held[p]);
  }
  for (int at = first + kHeld * stride; at < a.hidden; at += stride) {
    float more[kWidth] = {}, sums[kWidth];
    if (a.bias != nullptr) Load<kWidth>(a.bias + at).ToFloats(more);
    square += AddPack<kWidth>(a, row, at, more, sums);
  }
  square = WarpSum(square);
  if (threadIdx.x % kWarp == 0) squares[threadIdx.x / kWarp] = square;
  __syncthreads();
  const float scale = NormScale(squares, a.hidden, a.epsilon);
#pragma unroll
  for (int p = 0; p < kHeld; ++p) {
    if (first + p * stride >= a.hidden) break;
    float w[kWidth];
    weights[p].ToFloats(w);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) w[i] = Normed(w[i], held[p][i], scale);
    Store<kWidth>(a.normed + row + first + p * stride, w);
  }
  for (int at = first + kHeld * stride; at < a.hidden; at += stride) {
    float sums[kWidth], w[kWidth];
    Load<kWidth>(a.sum + row + at).ToFloats(sums);  // this thread's own
    Load<kWidth>(a.weight + at).ToFloats(w);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) w[i] = Normed(w[i], sums[i], scale);
    Store<kWidth>(a.normed + row + at, w);
  }
}

#if !TDA_BITS
// y + residual, and the squares of the sums, as a product that adds a residual makes them (row_totals.cuh).
struct AddSquaresArguments {
  Element* y;               // [tokens, columns]; then the sums
  const Element* residual;  // [tokens, columns]
  float* squares;           // [tokens, SquareParts(columns)]
  int tokens, columns;
};

// Block (x, y) adds kThreads columns of token x.
extern "C" __global__ void __launch_bounds__(kThreads) AddSquares(AddSquaresArguments a) {
  WaitForEarlierKernels();
  LetNextKernelStart();
  const Totals totals = {nullptr, a.residual, a.y, a.squares, static_cast<unsigned>(a.columns), blockIdx.x, blockIdx.x + 1};
  const Totals::Cell<kAnyTokens, kThreads> cell(totals, threadIdx.x);
  const float total = cell.wanted ? ToFloat(a.y[cell.Place(a.columns)]) : 0.0f;
  totals.Store(cell, total, totals.Read(cell));
}

struct RmsNormArguments {
  const Element* x;       // [tokens, columns]
  const float* squares;   // [tokens, SquareParts(columns)] of x
  const Element* weight;  // [columns]
  Element* normed;        // [tokens, columns]
  int tokens, columns;
  float epsilon;
};

// The norm of sums whose squares are given, as a product makes it of one token (row_linear.cu): one block a token.
extern "C" __global__ void __launch_bounds__(kThreads) RmsNorm(RmsNormArguments a) {
  WaitForEarlierKernels();
  LetNextKernelStart();
  const float* squares = a.squares + static_cast<size_t>(blockIdx.x) * SquareParts(a.columns);
  GivenSquares given;
  given.Read(squares, a.columns);
  const float scale = given.Scale(squares, a.columns, a.epsilon);
  const size_t row = static_cast<size_t>(blockIdx.x) * a.columns;
  for (int at = threadIdx.x; at < a.columns; at += kThreads) {
    a.normed[row + at] = FromFloat(Normed(ToFloat(a.weight[at]), ToFloat(a.x[row + at]), scale));
  }
}
#endif

#if TDA_BITS
#define TDA_LINEAR_FORMAT(width) CodeFormat<TDA_BITS, width * TDA_BITS / 32>
#else
#define TDA_LINEAR_FORMAT(width) ElementFormat<width>
#endif
#define TDA_LINEAR(tokens, width)                                              \
  extern "C" __global__ void __launch_bounds__(kThreads, tokens == 1 ? 2 : 1) \
      Linear_##tokens##_##width(LinearArguments arguments) {                  \
    Linear<tokens, TDA_LINEAR_FORMAT(width)>(arguments);                      \
  }

TDA_LINEAR(1, 8)
TDA_LINEAR(4, 8)
TDA_LINEAR(1, 1)
TDA_LINEAR(4, 1)
#if TDA_BITS
TDA_LINEAR(1, 16)
#endif
#if TDA_BITS == 4
TDA_LINEAR(1, 32)
#endif
#if !TDA_BITS
extern "C" __global__ void __launch_bounds__(kNormThreads) AddNorm_8(AddNormArguments a) { AddNorm<8>(a); }
extern "C" __global__ void __launch_bounds__(kNormThreads) AddNorm_1(AddNormArguments a) { AddNorm<1>(a); }
#endif
