#include "norm_cuda.h"

#include "cuda_matrix.h"

namespace tda {
namespace {

constexpr int64_t kNormThreads = 512;

struct AddNormArguments {
  const void* x;
  const void* residual;
  const void* bias;
  const void* weight;
  void* normed;
  void* sum;
  int hidden;
  float epsilon;
  int early;
};

}  // namespace

void NormTensors::Check() const {
  if (residual.Count() != x.Count()) Fail("residual: expected shape ", x.Shape(), ", got ", residual.Shape());
  if (bias.present && bias.Count() != weight.Count()) {
    Fail("bias: expected shape [", weight.Count(), "], got ", bias.Shape());
  }
}

bool NormTensors::Wide(const Tensor& sum) const {
  return weight.Count() % kWide == 0 && SuitsWideLoads(x) && SuitsWideLoads(residual) && SuitsWideLoads(weight) &&
         SuitsWideLoads(bias) && SuitsWideLoads(sum);
}

NormKernels::NormKernels(const KernelInfo& info, ElementType type)
    : epsilon_(info.Float("epsilon")), early_(info.Flag("early")) {
  const CudaModule& module = CudaModule::Get("linear", FormatDefines(type, 0));
  for (const bool wide : {false, true}) {
    kernels_[wide] = module.Kernel(wide ? "AddNorm_8" : "AddNorm_1", static_cast<int>(kNormThreads));
  }
}

void NormKernels::Launch(const KernelContext& context, const NormTensors& tensors, const Tensor& normed,
                         const Tensor& sum) const {
  if (tensors.x.Count() == 0) return;
  const int64_t hidden = tensors.weight.Count();
  const bool wide = tensors.Wide(sum) && SuitsWideLoads(normed);
  const AddNormArguments arguments = {tensors.x.data,      tensors.residual.data, tensors.bias.data,
                                      tensors.weight.data, normed.data,           sum.data,
                                      static_cast<int>(hidden), epsilon_,         early_};
  kernels_[wide].Launch(context.CudaStream(), tensors.x.Count() / hidden, 1, 1, kNormThreads, &arguments);
}

}  // namespace tda
