// Prepares a product of many tokens for cuBLAS: codes become elements, dropped inputs become zero, and the result
// begins with the bias. Compile-time constant: TDA_BITS of a code, 0 where there are none.

struct ExpandArguments {
  StoredMatrix matrix;
  Element* elements;              // [rows, columns]
  int first_row, first_column;    // of the matrix
  int rows, columns;              // how many
};

// One thread expands kWidth columns of a row, and the same columns of later rows.
template <int kWidth>
static __device__ __forceinline__ void Expand(const ExpandArguments& a) {
#if TDA_BITS
  WaitForEarlierKernels();
  LetNextKernelStart();
  const CodeFormat<TDA_BITS, kWidth * TDA_BITS / 32> matrix(a.matrix);
  const int column = (blockIdx.x * kThreads + threadIdx.x) * kWidth;
  if (column >= a.columns) return;
  for (int row = blockIdx.y; row < a.rows; row += gridDim.y) {
    const auto pack = matrix.At(a.first_row + row).Load(a.first_column + column);
    float values[kWidth];
    pack.ToFloats(values);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] *= pack.Scale();
    Store<kWidth>(a.elements + static_cast<size_t>(row) * a.columns + column, values);
  }
#endif
}

extern "C" __global__ void __launch_bounds__(kThreads) Expand_8(ExpandArguments arguments) { Expand<8>(arguments); }
extern "C" __global__ void __launch_bounds__(kThreads) Expand_1(ExpandArguments arguments) { Expand<1>(arguments); }

struct KeepArguments {
  const Element* x;        // [tokens, inputs]
  const float* row_price;  // [inputs]
  const float* price;      // [1]
  Element* kept;           // [tokens, inputs]
  const Element* bias;     // [outputs] or null
  Element* y;              // [tokens, outputs]
  int tokens, inputs, outputs;
};

// Copy x with zeros in place of dropped inputs, and fill y with the bias, if there is one.
extern "C" __global__ void __launch_bounds__(kThreads) KeepInputs(KeepArguments a) {
  WaitForEarlierKernels();
  LetNextKernelStart();
  const float price = *a.price;
  const int first = blockIdx.x * kThreads + threadIdx.x, stride = gridDim.x * kThreads;
  for (int token = blockIdx.y; token < a.tokens; token += gridDim.y) {
    const size_t row = static_cast<size_t>(token) * a.inputs;
    for (int i = first; i < a.inputs; i += stride) {
      const Element x = a.x[row + i];
      const float value = ToFloat(x);
      const bool dropped = __fmul_rn(__fmul_rn(value, value), a.row_price[i]) < price;  // NaN is kept
      a.kept[row + i] = dropped ? Element(0) : x;
    }
    if (a.bias == nullptr) continue;
    for (int i = first; i < a.outputs; i += stride) a.y[static_cast<size_t>(token) * a.outputs + i] = a.bias[i];
  }
}
