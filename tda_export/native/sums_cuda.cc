#include "sums_cuda.h"

#include "cuda_matrix.h"

namespace tda {
namespace {

struct AddSquaresArguments {
  void* y;
  const void* residual;
  float* squares;
  int tokens, columns;
};

struct RmsNormArguments {
  const void* x;
  const float* squares;
  const void* weight;
  void* normed;
  int tokens, columns;
  float epsilon;
};

}  // namespace

SumKernels::SumKernels(ElementType type) {
  const CudaModule& module = CudaModule::Get("linear", FormatDefines(type, 0));
  add_ = module.Kernel("AddSquares", kThreads);
  norm_ = module.Kernel("RmsNorm", kThreads);
}

void SumKernels::Add(const KernelContext& context, int64_t tokens, int64_t columns, const Addition& addition,
                     void* y) const {
  const AddSquaresArguments arguments = {y, addition.residual, addition.squares, static_cast<int>(tokens),
                                         static_cast<int>(columns)};
  add_.Launch(context.CudaStream(), tokens, CeilDivide(columns, kThreads), 1, kThreads, &arguments);
}

void SumKernels::Norm(const KernelContext& context, int64_t tokens, int64_t columns, const void* sums,
                      const float* squares, const void* weight, float epsilon, void* normed) const {
  const RmsNormArguments arguments = {sums,   squares, weight, normed, static_cast<int>(tokens), static_cast<int>(columns),
                                      epsilon};
  norm_.Launch(context.CudaStream(), tokens, 1, 1, kThreads, &arguments);
}

}  // namespace tda
