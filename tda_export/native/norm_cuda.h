// The kernels of tda::AddNorm (device/linear.cu), for the operator and for products that make their own norm.
#pragma once

#include "cuda_module.h"

namespace tda {

struct NormTensors {
  Tensor x, residual, weight, bias;  // [.., hidden] twice, [hidden] twice; bias may be absent

  // Throw unless residual and bias suit x and weight.
  void Check() const;

  // Whether threads load wide packs, given where results go. The order in which squares are added depends on it.
  bool Wide(const Tensor& sum) const;
};

class NormKernels {
 public:
  NormKernels(const KernelInfo& info, ElementType type);

  void Launch(const KernelContext& context, const NormTensors& tensors, const Tensor& normed, const Tensor& sum) const;

  float epsilon() const { return epsilon_; }

 private:
  const float epsilon_;
  const bool early_;
  CudaKernel kernels_[2];  // by wide loads
};

}  // namespace tda
