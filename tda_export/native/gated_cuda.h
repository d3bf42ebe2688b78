// The kernels of tda::GatedActivation (device/gated_activation.cu), for the operator and for products that make their own.
#pragma once

#include <string>

#include "cuda_module.h"
#include "gated.h"

namespace tda {

// Name the attribute `activation` to device code.
std::string ActivationDefine(const KernelInfo& info);

class GatedKernels {
 public:
  GatedKernels(const KernelInfo& info, ElementType type);

  void Launch(const KernelContext& context, const GatedCall& call, const Tensor& h) const;

 private:
  CudaKernel kernels_[2];  // by wide loads
};

}  // namespace tda
