// tda::NormRowLinear and tda::GatedRowLinear on CUDA: AddNorm or GatedActivation, and the RowLinear that reads the result.
//
// For one token, one kernel does both (device/row_linear.cu). For more, each is launched by itself. Either way the bits are
// those of separate operators.
#include "row_linear_fused_cuda.h"

#include <utility>

#include "gated_cuda.h"
#include "norm_cuda.h"
#include "row_product_cuda.h"

namespace tda {
namespace {

constexpr size_t kElementBytes = 2;

// x, residual, norm_weight, then RowLinear's inputs after x; outputs y and sum.
template <ElementType kType, int kBits>
class NormRowLinear : public Kernel {
 public:
  explicit NormRowLinear(const KernelInfo& info)
      : allocator_(info), norm_(info, kType), product_(info, kType, kBits, RowInputs::kNormed) {}

  void Compute(const KernelContext& context) override {
    const RowLinearCall call = product_.Read(context, {3, "x", 1});
    const NormTensors tensors = {call.x, context.Input(1), context.Input(2), {}};
    if (tensors.weight.Count() != call.inputs) {
      Fail("norm_weight: expected shape [", call.inputs, "], as w has ", call.inputs, " rows, got ",
           tensors.weight.Shape());
    }
    tensors.Check();
    const Tensor sum = context.OutputLike(1, call.x);
    if (call.tokens == 1 && call.outputs > 0) {
      RowLinearArguments made = {};
      made.x = call.x.data;
      made.other = tensors.residual.data;
      made.norm_weight = tensors.weight.data;
      made.sum = sum.data;
      made.epsilon = norm_.epsilon();
      made.wide = tensors.Wide(sum);
      product_.MultiplyMade(context, call, made);
    } else if (call.tokens > 0) {
      const Scratch scratch(context, allocator_, call.tokens * call.inputs * kElementBytes, true);
      Tensor normed = call.x;
      normed.data = scratch.As<void>();
      norm_.Launch(context, tensors, normed, sum);
      product_.Multiply(context, call, normed.data);
    }
  }

 private:
  const Allocator allocator_;
  const NormKernels norm_;
  const RowProduct product_;
};

// gate and up, or both side by side, then RowLinear's inputs after x.
template <ElementType kType, int kBits>
class GatedRowLinear : public Kernel {
 public:
  explicit GatedRowLinear(const KernelInfo& info)
      : allocator_(info),
        gated_(info, kType),
        product_(info, kType, kBits, RowInputs::kGated, {ActivationDefine(info)}) {}

  void Compute(const KernelContext& context) override {
    const GatedCall gated(context);
    const RowLinearCall call = product_.Read(context, {2, "gate", gated.up.present ? 1 : 2});
    if (call.y.Count() == 0) return;
    if (call.tokens == 1) {
      RowLinearArguments made = {};
      made.x = gated.gate.data;
      made.other = gated.Up<uint16_t>();
      product_.MultiplyMade(context, call, made);
      return;
    }
    const Scratch scratch(context, allocator_, call.tokens * call.inputs * kElementBytes, true);
    Tensor h = gated.h;
    h.data = scratch.As<void>();
    gated_.Launch(context, gated, h);
    product_.Multiply(context, call, h.data);
  }

 private:
  const Allocator allocator_;
  const GatedKernels gated_;
  const RowProduct product_;
};

template <ElementType kType, int kBits>
void Define(std::vector<OpDefinition>& definitions, const char* norm, const char* gated) {
  const std::vector<IoType> weight = kBits > 0 ? CodeTypes() : std::vector<IoType>{{kType}};
  definitions.emplace_back(norm, kCudaProvider, RowLinearInputs({{kType}, {kType}, {kType}}, kType, weight),
                           std::vector<IoType>{{kType}, {kType}}, Create<NormRowLinear<kType, kBits>>);
  definitions.emplace_back(gated, kCudaProvider, RowLinearInputs({{kType}, {kType, true}}, kType, weight),
                           std::vector<IoType>{{kType}}, Create<GatedRowLinear<kType, kBits>>);
}

template <ElementType kType>
void DefineAll(std::vector<OpDefinition>& definitions) {
  Define<kType, 0>(definitions, "NormRowLinear", "GatedRowLinear");
  Define<kType, 4>(definitions, "NormRowLinear4", "GatedRowLinear4");
  Define<kType, 8>(definitions, "NormRowLinear8", "GatedRowLinear8");
}

}  // namespace

std::vector<OpDefinition> FusedRowLinearOnCuda() {
  std::vector<OpDefinition> definitions;
  DefineAll<kHalf>(definitions);
  DefineAll<kBfloat16>(definitions);
  return definitions;
}

}  // namespace tda
