#include "cublas.h"

#include "dynamic_library.h"

namespace tda {
namespace {

constexpr int kNoTranspose = 0, kTranspose = 1;   // cublasOperation_t
constexpr int kFloat16Data = 2, kBfloat16Data = 14;  // cudaDataType_t
constexpr int kFloat32Sums = 68;                  // CUBLAS_COMPUTE_32F
constexpr int kDefaultAlgorithm = -1;             // CUBLAS_GEMM_DEFAULT

using GemmFunction = int(void* handle, int matrix_operation, int x_operation, int outputs, int tokens, int inputs,
                         const void* alpha, const void* matrix, int matrix_type, int matrix_stride, const void* x,
                         int x_type, int x_stride, const void* beta, void* y, int y_type, int y_stride, int sums,
                         int algorithm);

}  // namespace

struct Cublas::Functions {
  GemmFunction* gemm = nullptr;
};

Cublas::Cublas() {
  // The library that the provider was linked with: its handles fit no other version, and another one may be open too.
  static const DynamicLibrary provider = DynamicLibrary::Opened("libonnxruntime_providers_cuda.so");
  static const Functions functions = [] {
    Functions found;
    if (provider.loaded()) provider.Find("cublasGemmEx", found.gemm);
    return found;
  }();
  if (functions.gemm == nullptr) Fail("the cuBLAS of ONNX Runtime's CUDA provider cannot be found in this process");
  functions_ = &functions;
}

void Cublas::Multiply(const KernelContext& context, const MatrixProduct& product) const {
  const float alpha = 1.0f, beta = product.add ? 1.0f : 0.0f;
  const int type = product.type == kHalf ? kFloat16Data : kBfloat16Data;
  const int inputs = static_cast<int>(product.inputs), outputs = static_cast<int>(product.outputs);
  // cuBLAS is column-major, so it sees the transpose of each of these matrices: y' = matrix' x'.
  const int result = functions_->gemm(context.CublasHandle(), product.output_major ? kTranspose : kNoTranspose, kNoTranspose,
                            outputs, static_cast<int>(product.tokens), inputs, &alpha, product.matrix, type,
                            product.output_major ? inputs : outputs, product.x, type, inputs, &beta, product.y, type,
                            static_cast<int>(product.y_stride), kFloat32Sums, kDefaultAlgorithm);
  if (result != 0) Fail("cuBLAS could not multiply (status ", result, ")");
}

}  // namespace tda
