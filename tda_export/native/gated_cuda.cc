#include "gated_cuda.h"

#include <algorithm>

#include "activation.h"
#include "indexed_ffn_device.h"

namespace tda {
namespace {

struct GatedArguments {
  const void* gate;
  const void* up;
  void* h;
  int tokens, neurons, stride;
};

}  // namespace

std::string ActivationDefine(const KernelInfo& info) {
  return "TDA_ACTIVATION=" + std::to_string(static_cast<int>(ParseActivation(info.String("activation"))));
}

GatedKernels::GatedKernels(const KernelInfo& info, ElementType type) {
  RequireDtype(type);
  const CudaModule& module = CudaModule::Get(
      "gated_activation", {"TDA_BF16=" + std::to_string(type == kBfloat16), ActivationDefine(info)});
  for (const bool wide : {false, true}) kernels_[wide] = module.Kernel(wide ? "Gated_8" : "Gated_1", kThreads);
}

void GatedKernels::Launch(const KernelContext& context, const GatedCall& call, const Tensor& h) const {
  if (call.tokens == 0) return;
  const bool wide =
      call.neurons % kWide == 0 && SuitsWideLoads(call.gate) && SuitsWideLoads(call.up) && SuitsWideLoads(h);
  const GatedArguments arguments = {call.gate.data, call.Up<uint16_t>(), h.data, static_cast<int>(call.tokens),
                                    static_cast<int>(call.neurons), static_cast<int>(call.stride)};
  const int64_t blocks = CeilDivide(call.neurons, kThreads * (wide ? kWide : 1));
  kernels_[wide].Launch(context.CudaStream(), blocks, std::min(call.tokens, kMostBlocks), 1, kThreads, &arguments);
}

}  // namespace tda
