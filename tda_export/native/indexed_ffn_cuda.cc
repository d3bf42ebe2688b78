// tda::IndexedFFN on CUDA: what device/indexed_ffn.cu computes, launched on ONNX Runtime's stream.
//
// Nothing is shared between calls: activations and partial sums lie in scratch memory of the call.
#include "indexed_ffn_cuda.h"

#include <algorithm>

#include "indexed_ffn.h"
#include "indexed_ffn_device.h"

namespace tda {
namespace {

template <ElementType kType>
class IndexedFfnCuda : public Kernel {
 public:
  explicit IndexedFfnCuda(const KernelInfo& info)
      : allocator_(info), layer_(info.Int("layer")), gated_(info.Flag("gated")), early_(info.Flag("early")) {
    RequireDtype(kType);
    // Compiled here, when the session is made, and not when it first runs.
    const std::vector<std::string> defines = {
        "TDA_BF16=" + std::to_string(kType == kBfloat16),
        "TDA_ACTIVATION=" + std::to_string(static_cast<int>(ParseActivation(info.String("activation")))),
        "TDA_GATED=" + std::to_string(gated_),
    };
    auto kernel = [&](const std::string& name) {
      return CudaModule::Get("indexed_ffn", defines).Kernel(name.c_str(), kThreads);
    };
    for (const bool tile : {false, true}) {
      for (const bool wide : {false, true}) {
        const std::string suffix = std::string(tile ? "_4" : "_1") + (wide ? "_8" : "_1");
        kernels_[tile][wide] = {kernel("Activations" + suffix), kernel("DownSums" + suffix)};
      }
    }
  }

  void Compute(const KernelContext& context) override {
    const IndexedFfnArguments call(context, layer_);
    if (call.gate.present != gated_) Fail("w_gate: ", gated_ ? "missing, but gated is 1" : "given, but gated is 0");
    const Tensor y = context.OutputLike(0, call.x);
    if (call.tokens == 0) return;
    const bool wide = call.hidden % kWide == 0 && SuitsWideLoads(call.x) && SuitsWideLoads(call.gate) &&
                      SuitsWideLoads(call.up) && SuitsWideLoads(call.down);
    const Kernels& kernels = kernels_[call.tokens > 1][wide];
    const DownSumsLayout layout(kernels.down_sums, call.tokens, call.hidden, call.indices, wide);
    const int64_t blocks =
        std::clamp<int64_t>(CeilDivide(call.indices, kWarps), 1, kernels.activations.resident_blocks);
    const Scratch scratch(context, allocator_, layout.bytes, true);

    FfnArguments arguments = {};
    arguments.x = call.x.data;
    arguments.mask_indices = call.mask_indices.As<const int32_t>();
    arguments.gate = call.gate.data;
    arguments.up = call.up.data;
    arguments.down = call.down.data;
    arguments.gate_bias = call.gate_bias.data;
    arguments.up_bias = call.up_bias.data;
    arguments.down_bias = call.down_bias.data;
    arguments.neuron_scale = call.neuron_scale.As<const float>();
    arguments.threshold = call.token_thresholds.present ? call.token_thresholds.As<const float>() + layer_ : nullptr;
    arguments.y = y.data;
    arguments.tokens = static_cast<int>(call.tokens);
    arguments.hidden = static_cast<int>(call.hidden);
    arguments.neurons = static_cast<int>(call.neurons);
    arguments.indices = static_cast<int>(call.indices);
    arguments.early = early_;
    layout.Place(scratch, arguments);
    void* stream = context.CudaStream();
    kernels.activations.Launch(stream, blocks, layout.tiles, 1, kThreads, &arguments);
    kernels.down_sums.Launch(stream, layout.groups, layout.slices, layout.tiles, kThreads, &arguments);
  }

 private:
  struct Kernels {
    CudaKernel activations, down_sums;
  };

  const Allocator allocator_;
  const int64_t layer_;
  const bool gated_;
  const bool early_;
  Kernels kernels_[2][2];  // by tile of tokens and wide loads
};

}  // namespace

OpDefinition IndexedFfnOnCuda(ElementType type) {
  return OpDefinition("IndexedFFN", kCudaProvider, IndexedFfnInputs(type), {{type}},
                      type == kHalf ? Create<IndexedFfnCuda<kHalf>> : Create<IndexedFfnCuda<kBfloat16>>);
}

}  // namespace tda
