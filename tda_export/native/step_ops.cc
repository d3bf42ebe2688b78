// tda::GatedActivation, act(gate) * up, and tda::CallPrice, the price of a call: 0 where it has no past.
#include "step_ops.h"

#include <string>

#include "activation.h"
#include "cuda_module.h"
#include "gated_cpu.h"
#include "gated_cuda.h"
#include "indexed_ffn_device.h"

namespace tda {
namespace {

class GatedActivationCpu : public Kernel {
 public:
  explicit GatedActivationCpu(const KernelInfo& info) : activation_(ParseActivation(info.String("activation"))) {}

  void Compute(const KernelContext& context) override {
    const GatedCall call(context);
    const Tensor output = context.OutputLike(0, call.h);
    for (int64_t t = 0; t < call.tokens; ++t) {
      const float* gate = call.gate.As<const float>() + t * call.stride;
      const float* up = call.Up<float>() + t * call.stride;
      float* h = output.As<float>() + t * call.neurons;
      MultiplyGated(activation_, gate, up, call.neurons, h);
    }
  }

 private:
  const Activation activation_;
};

template <ElementType kType>
class GatedActivationCuda : public Kernel {
 public:
  explicit GatedActivationCuda(const KernelInfo& info) : kernels_(info, kType) {}

  void Compute(const KernelContext& context) override {
    const GatedCall call(context);
    kernels_.Launch(context, call, context.OutputLike(0, call.h));
  }

 private:
  const GatedKernels kernels_;
};

// input_ids [1, S], attention_mask [1, T] and a price [1]; the result is a price [1].
struct PriceCall {
  explicit PriceCall(const KernelContext& context)
      : mask(context.Input(1)), given(context.Input(2)), tokens(context.Input(0).Count()) {
    if (given.Count() != 1) Fail("given: expected shape [1], got ", given.Shape());
    price = context.OutputLike(0, given);
  }

  Tensor mask, given, price;
  int64_t tokens;
};

class CallPriceCpu : public Kernel {
 public:
  explicit CallPriceCpu(const KernelInfo&) {}

  void Compute(const KernelContext& context) override {
    const PriceCall call(context);
    const int64_t* mask = call.mask.As<const int64_t>();
    int64_t total = 0;
    for (int64_t i = 0; i < call.mask.Count(); ++i) total += mask[i];
    *call.price.As<float>() = total > call.tokens ? *call.given.As<const float>() : 0.0f;
  }
};

struct CallPriceArguments {
  const void* mask;
  const void* given;
  void* price;
  int tokens, buffer;
};

class CallPriceCuda : public Kernel {
 public:
  explicit CallPriceCuda(const KernelInfo&)
      : kernel_(CudaModule::Get("call_price", {"TDA_BF16=0"}).Kernel("CallPrice", kWarp)) {}

  void Compute(const KernelContext& context) override {
    const PriceCall call(context);
    const CallPriceArguments arguments = {call.mask.data, call.given.data, call.price.data,
                                          static_cast<int>(call.tokens), static_cast<int>(call.mask.Count())};
    kernel_.Launch(context.CudaStream(), 1, 1, 1, kWarp, &arguments);
  }

 private:
  const CudaKernel kernel_;
};

OpDefinition Gated(const char* provider, ElementType type, KernelFactory create) {
  return OpDefinition("GatedActivation", provider, {{type}, {type, true}}, {{type}}, create);
}

OpDefinition Price(const char* provider, KernelFactory create) {
  return OpDefinition("CallPrice", provider, {{kInt64}, {kInt64}, {kFloat}}, {{kFloat}}, create);
}

}  // namespace

std::vector<OpDefinition> StepOps() {
  return {
      Gated(nullptr, kFloat, Create<GatedActivationCpu>),
      Gated(kCudaProvider, kHalf, Create<GatedActivationCuda<kHalf>>),
      Gated(kCudaProvider, kBfloat16, Create<GatedActivationCuda<kBfloat16>>),
      Price(nullptr, Create<CallPriceCpu>),
      Price(kCudaProvider, Create<CallPriceCuda>),
  };
}

}  // namespace tda
