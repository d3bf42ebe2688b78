// Products of matrices by cuBLAS, on the handle of ONNX Runtime's CUDA provider.
#pragma once

#include "ort.h"

namespace tda {

// y [tokens, outputs] of rows `y_stride` apart = x [tokens, inputs] times a matrix, plus what y holds where `add` says so.
// The matrix is [inputs, outputs], or [outputs, inputs] where `output_major` says so. All are of one type, float16 or
// bfloat16; sums are float32.
struct MatrixProduct {
  ElementType type;
  bool output_major, add;
  const void* x;
  const void* matrix;
  void* y;
  int64_t tokens, inputs, outputs, y_stride;
};

// The functions of cuBLAS.
class Cublas {
 public:
  // Throws where they cannot be found.
  Cublas();

  // Start a product on the stream of a call. Throws where cuBLAS refuses.
  void Multiply(const KernelContext& context, const MatrixProduct& product) const;

 private:
  struct Functions;
  const Functions* functions_;  // kept for the process
};

}  // namespace tda
