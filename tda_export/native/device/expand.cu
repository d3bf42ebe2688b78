// Prepares a product of many tokens for cuBLAS: codes become elements, dropped inputs become zero, and the result
// begins with the bias. Compile-time constant: TDA_BITS of a code, 0 where there are none.

struct ExpandArguments {
  StoredMatrix matrix;
  Element* elements;              // [rows, columns]
  int first_row, first_column;    // of the matrix
  int rows, columns;              // how many
};

// One thread expands a column of a row, and the same column of later rows.
extern "C" __global__ void __launch_bounds__(kThreads) Expand_1(ExpandArguments a) {
#if TDA_BITS
  WaitForEarlierKernels();
  LetNextKernelStart();
  const CodeFormat<TDA_BITS, 0> matrix(a.matrix);
  const int column = blockIdx.x * kThreads + threadIdx.x;
  if (column >= a.columns) return;
  for (int row = blockIdx.y; row < a.rows; row += gridDim.y) {
    const auto pack = matrix.At(a.first_row + row).Load(a.first_column + column);
    float value;
    pack.ToFloats(&value);
    a.elements[static_cast<size_t>(row) * a.columns + column] = FromFloat(value * pack.Scale());
  }
#endif
}

#if TDA_BITS
// Two elements in a word, the first one in its low half.
#if TDA_BF16
static __device__ __forceinline__ unsigned Bfloat16s(float low, float high) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
#else
// Return the differences of the codes 2 k and 2 k + 1 of a word of eight-bit codes from a zero point, by way of 1024 + c.
template <int k>
static __device__ __forceinline__ unsigned EightBitDifferences(unsigned word, const ZeroHalves& zero) {
  const unsigned codes = __byte_perm(word, 0x64646464u, k == 0 ? 0x4140 : 0x4342);
  unsigned differences;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(differences) : "r"(codes), "r"(zero.subtracted));
  return differences;
}
#endif

// Return the eight elements of a pack. A difference times a scale is rounded once: float32 holds the product exactly, and
// float16 multiplies the exact factors.
template <class Weights>
static __device__ __forceinline__ uint4 Elements(const Weights& pack) {
#if TDA_BF16
  float values[8];
  pack.ToFloats(values);
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] *= pack.Scale();
  return make_uint4(Bfloat16s(values[0], values[1]), Bfloat16s(values[2], values[3]), Bfloat16s(values[4], values[5]),
                    Bfloat16s(values[6], values[7]));
#else
  const ZeroHalves zero(pack.ZeroPoint());
  const unsigned scales = pack.scale * 0x10001u;
#if TDA_BITS == 4
  const unsigned codes_0_4 = ProductOf(Differences<0>(pack.words[0], zero), scales);
  const unsigned codes_1_5 = ProductOf(Differences<1>(pack.words[0], zero), scales);
  const unsigned codes_2_6 = ProductOf(Differences<2>(pack.words[0], zero), scales);
  const unsigned codes_3_7 = ProductOf(Differences<3>(pack.words[0], zero), scales);
  constexpr unsigned kLow = 0x5410, kHigh = 0x7632;
  return make_uint4(__byte_perm(codes_0_4, codes_1_5, kLow), __byte_perm(codes_2_6, codes_3_7, kLow),
                    __byte_perm(codes_0_4, codes_1_5, kHigh), __byte_perm(codes_2_6, codes_3_7, kHigh));
#else
  return make_uint4(ProductOf(EightBitDifferences<0>(pack.words[0], zero), scales),
                    ProductOf(EightBitDifferences<1>(pack.words[0], zero), scales),
                    ProductOf(EightBitDifferences<0>(pack.words[1], zero), scales),
                    ProductOf(EightBitDifferences<1>(pack.words[1], zero), scales));
#endif
#endif
}

constexpr int kExpandedTogether = 4;  // rows, whose loads are under way together

// Expand eight columns, those of `weights`, of rows from `first` on.
template <int kRows, class Column>
static __device__ __forceinline__ void ExpandColumns(const ExpandArguments& a, const Column& weights, int first,
                                                     Element* elements) {
  decltype(weights.Load(0)) packs[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) packs[i] = weights.Load(a.first_row + first + i);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    *reinterpret_cast<uint4*>(elements + Product(first + i, a.columns)) = Elements(packs[i]);
  }
}
#endif

// One thread expands eight columns of kExpandedTogether rows, and of later rows.
extern "C" __global__ void __launch_bounds__(kThreads) Expand_8(ExpandArguments a) {
#if TDA_BITS
  constexpr int kWidth = 8;
  WaitForEarlierKernels();
  LetNextKernelStart();
  const int column = (blockIdx.x * kThreads + threadIdx.x) * kWidth;
  if (column >= a.columns) return;
  using Format = CodeFormat<TDA_BITS, kWidth * TDA_BITS / 32>;
  const int slice = a.first_column + column - threadIdx.x % kWarp * kWidth;  // of a warp
  const auto weights = Format(a.matrix).From(slice);
  Element* elements = a.elements + column;
  for (int first = blockIdx.y * kExpandedTogether; first < a.rows; first += gridDim.y * kExpandedTogether) {
    if (first + kExpandedTogether <= a.rows) {
      ExpandColumns<kExpandedTogether>(a, weights, first, elements);
    } else {
      for (int row = first; row < a.rows; ++row) ExpandColumns<1>(a, weights, row, elements);
    }
  }
#endif
}

struct KeepArguments {
  const Element* x;        // [tokens, inputs]
  const float* row_price;  // [inputs]
  const float* price;      // [1]
  Element* kept;           // [tokens, inputs]
  const Element* bias;     // [outputs] or null
  Element* y;              // [tokens, outputs]
  int tokens, inputs, outputs;
};

// Copy x with zeros in place of dropped inputs, and fill y with the bias, if there is one. A thread has kWidth inputs of
// several tokens, so it reads their prices once.
template <int kWidth>
static __device__ __forceinline__ void Keep(const KeepArguments& a) {
  WaitForEarlierKernels();
  LetNextKernelStart();
  const float price = *a.price;
  const int first = (blockIdx.x * kThreads + threadIdx.x) * kWidth, stride = gridDim.x * kThreads * kWidth;
  for (int i = first; i < a.inputs; i += stride) {
    float row_price[kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) row_price[k] = a.row_price[i + k];
    for (int token = blockIdx.y; token < a.tokens; token += gridDim.y) {
      const size_t at = static_cast<size_t>(token) * a.inputs + i;
      float values[kWidth];
      Load<kWidth>(a.x + at).ToFloats(values);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        if (__fmul_rn(__fmul_rn(values[k], values[k]), row_price[k]) < price) values[k] = 0.0f;  // NaN is kept
      }
      Store<kWidth>(a.kept + at, values);
    }
  }
  if (a.bias == nullptr) return;
  for (int i = first; i < a.outputs; i += stride) {
    float values[kWidth];
    Load<kWidth>(a.bias + i).ToFloats(values);
    for (int token = blockIdx.y; token < a.tokens; token += gridDim.y) {
      Store<kWidth>(a.y + static_cast<size_t>(token) * a.outputs + i, values);
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads) Keep_8(KeepArguments arguments) { Keep<8>(arguments); }
extern "C" __global__ void __launch_bounds__(kThreads) Keep_1(KeepArguments arguments) { Keep<1>(arguments); }
