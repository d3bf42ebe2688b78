// tda::GatedActivation, act(gate) * up, and tda::CallStart, the price and the lengths of a call.
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

// input_ids [1, S], attention_mask [1, T] and a price [1]; the results are a price [1] and, of CallStart, how many tokens
// past and call have together [1], and the same less one [1].
struct StartCall {
  StartCall(const KernelContext& context, bool counts)
      : mask(context.Input(1)), given(context.Input(2)), tokens(context.Input(0).Count()) {
    if (given.Count() != 1) Fail("given: expected shape [1], got ", given.Shape());
    price = context.OutputLike(0, given);
    if (!counts) return;
    total = context.Output(1, {1}).As<int64_t>();
    last_index = context.Output(2, {1}).As<int32_t>();
  }

  Tensor mask, given, price;
  int64_t tokens;
  int64_t* total = nullptr;
  int32_t* last_index = nullptr;
};

template <bool kCounts>
class CallStartCpu : public Kernel {
 public:
  explicit CallStartCpu(const KernelInfo&) {}

  void Compute(const KernelContext& context) override {
    const StartCall call(context, kCounts);
    const int64_t* mask = call.mask.As<const int64_t>();
    int64_t total = 0;
    for (int64_t i = 0; i < call.mask.Count(); ++i) total += mask[i];
    *call.price.As<float>() = total > call.tokens ? *call.given.As<const float>() : 0.0f;
    if (!kCounts) return;
    *call.total = total;
    *call.last_index = static_cast<int32_t>(total - 1);
  }
};

struct CallStartArguments {
  const void* mask;
  const void* given;
  void* price;
  void* total;
  void* last_index;
  int tokens, buffer;
};

constexpr unsigned kCallThreads = 1024;  // device/call_start.cu

template <bool kCounts>
class CallStartCuda : public Kernel {
 public:
  explicit CallStartCuda(const KernelInfo&)
      : kernel_(CudaModule::Get("call_start", {"TDA_BF16=0"}).Kernel("CallStart", kCallThreads)) {}

  void Compute(const KernelContext& context) override {
    const StartCall call(context, kCounts);
    const CallStartArguments arguments = {call.mask.data,
                                          call.given.data,
                                          call.price.data,
                                          call.total,
                                          call.last_index,
                                          static_cast<int>(call.tokens),
                                          static_cast<int>(call.mask.Count())};
    kernel_.Launch(context.CudaStream(), 1, 1, 1, kCallThreads, &arguments);
  }

 private:
  const CudaKernel kernel_;
};

OpDefinition Gated(const char* provider, ElementType type, KernelFactory create) {
  return OpDefinition("GatedActivation", provider, {{type}, {type, true}}, {{type}}, create);
}

// CallPrice, which counts nothing, is of earlier artifacts.
template <bool kCounts>
OpDefinition Start(const char* provider, KernelFactory create) {
  const std::vector<IoType> inputs = {{kInt64}, {kInt64}, {kFloat}};
  if (!kCounts) return OpDefinition("CallPrice", provider, inputs, {{kFloat}}, create);
  return OpDefinition("CallStart", provider, inputs, {{kFloat}, {kInt64}, {kInt32}}, create);
}

}  // namespace

std::vector<OpDefinition> StepOps() {
  return {
      Gated(nullptr, kFloat, Create<GatedActivationCpu>),
      Gated(kCudaProvider, kHalf, Create<GatedActivationCuda<kHalf>>),
      Gated(kCudaProvider, kBfloat16, Create<GatedActivationCuda<kBfloat16>>),
      Start<false>(nullptr, Create<CallStartCpu<false>>),
      Start<false>(kCudaProvider, Create<CallStartCuda<false>>),
      Start<true>(nullptr, Create<CallStartCpu<true>>),
      Start<true>(kCudaProvider, Create<CallStartCuda<true>>),
  };
}

}  // namespace tda
