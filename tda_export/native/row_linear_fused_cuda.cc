// Products with what stands before or after them, on CUDA: a norm or gated activation that x comes from, and the residual
// that is added to y.
//
// For one token, one kernel does it all (device/row_linear.cu). For more, norms and gated activations are launched by
// themselves, and for many so is the addition. Either way the bits are the same.
#include "row_linear_fused_cuda.h"

#include <optional>
#include <utility>
#include <vector>

#include "gated_cuda.h"
#include "norm_cuda.h"
#include "row_product_cuda.h"

namespace tda {
namespace {

constexpr size_t kElementBytes = 2;

// The residual of a call, which is the input 0, and its output 1: square parts of y.
class ResidualCall {
 public:
  ResidualCall(const KernelContext& context, const RowLinearCall& call, const SumKernels& kernels) {
    const Tensor residual = context.Input(0);
    if (residual.Shape() != call.y.Shape()) {
      Fail("residual: expected shape ", call.y.Shape(), ", as the call has ", call.tokens, " tokens and w ", call.outputs,
           " columns, got ", residual.Shape());
    }
    Tensor shape = call.y;
    shape.sizes[shape.rank - 1] = SquareParts(call.outputs);
    addition_ = {residual.data, context.OutputLike(1, shape).As<float>(), &kernels};
  }

  const Addition& addition() const { return addition_; }

 private:
  Addition addition_;
};

// residual, x, then RowLinear's inputs after x; outputs sum and squares.
template <ElementType kType, int kBits>
class RowLinearAdd : public Kernel {
 public:
  explicit RowLinearAdd(const KernelInfo& info) : product_(info, kType, kBits, 2), sums_(kType) {}

  void Compute(const KernelContext& context) override {
    const RowLinearCall call = product_.Read(context, {2, "x", 1, 1});
    const ResidualCall residual(context, call, sums_);
    product_.Multiply(context, call, call.x.data, residual.addition());
  }

 private:
  const RowProduct product_;
  const SumKernels sums_;
};

// Throw unless squares are the square parts of so many tokens of x.
void CheckSquares(const Tensor& squares, int64_t tokens, int64_t columns) {
  const int64_t parts = SquareParts(columns);
  if (squares.rank == 0 || squares.sizes[squares.rank - 1] != parts || squares.Count() != tokens * parts) {
    Fail("squares: expected shape [.., ", parts, "] of ", tokens, " tokens, got ", squares.Shape());
  }
}

// x, square parts of x, norm_weight; output the norm.
template <ElementType kType>
class RmsNorm : public Kernel {
 public:
  explicit RmsNorm(const KernelInfo& info) : epsilon_(info.Float("epsilon")), sums_(kType) {}

  void Compute(const KernelContext& context) override {
    const Tensor x = context.Input(0), squares = context.Input(1), weight = context.Input(2);
    const int64_t columns = weight.Count();
    if (columns == 0 || x.rank == 0 || x.sizes[x.rank - 1] != columns) {
      Fail("x: expected shape [.., ", columns, "], got ", x.Shape());
    }
    const int64_t tokens = x.Count() / columns;
    CheckSquares(squares, tokens, columns);
    const Tensor normed = context.OutputLike(0, x);
    if (tokens == 0) return;
    sums_.Norm(context, tokens, columns, x.data, squares.As<const float>(), weight.data, epsilon_, normed.data);
  }

 private:
  const float epsilon_;
  const SumKernels sums_;
};

// x, square parts of x, norm_weight, then RowLinear's inputs after x; output y.
template <ElementType kType, int kBits>
class RmsRowLinear : public Kernel {
 public:
  explicit RmsRowLinear(const KernelInfo& info)
      : epsilon_(info.Float("epsilon")), allocator_(info), product_(info, kType, kBits, 3, RowInputs::kRms), sums_(kType) {}

  void Compute(const KernelContext& context) override {
    const RowLinearCall call = product_.Read(context, {3, "x", 1});
    const Tensor squares = context.Input(1), weight = context.Input(2);
    CheckSquares(squares, call.tokens, call.inputs);
    CheckNormWeight(call, weight);
    if (call.y.Count() == 0) return;
    if (call.tokens == 1) {
      RowLinearArguments made = {};
      made.x = call.x.data;
      made.x_squares = squares.As<const float>();
      made.norm_weight = weight.data;
      made.epsilon = epsilon_;
      product_.MultiplyMade(context, call, made);
      return;
    }
    const Scratch scratch(context, allocator_, call.tokens * call.inputs * kElementBytes, true);
    sums_.Norm(context, call.tokens, call.inputs, call.x.data, squares.As<const float>(), weight.data, epsilon_,
               scratch.As<void>());
    product_.Multiply(context, call, scratch.As<void>());
  }

 private:
  const float epsilon_;
  const Allocator allocator_;
  const RowProduct product_;
  const SumKernels sums_;
};

// x, residual, norm_weight, then RowLinear's inputs after x; outputs y and sum.
template <ElementType kType, int kBits>
class NormRowLinear : public Kernel {
 public:
  explicit NormRowLinear(const KernelInfo& info)
      : allocator_(info), norm_(info, kType), product_(info, kType, kBits, 3, RowInputs::kNormed) {}

  void Compute(const KernelContext& context) override {
    const RowLinearCall call = product_.Read(context, {3, "x", 1});
    const NormTensors tensors = {call.x, context.Input(1), context.Input(2), {}};
    CheckNorm(call, tensors.residual, tensors.weight);
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

// gate and up, or both side by side, then RowLinear's inputs after x; with kAdds the residual ahead of these, and the
// outputs of RowLinearAdd.
template <ElementType kType, int kBits, bool kAdds>
class GatedRowLinear : public Kernel {
 public:
  explicit GatedRowLinear(const KernelInfo& info)
      : allocator_(info),
        gated_(info, kType),
        product_(info, kType, kBits, kAdds + 2, RowInputs::kGated, {ActivationDefine(info)}) {
    if constexpr (kAdds) sums_.emplace(kType);
  }

  void Compute(const KernelContext& context) override {
    const GatedCall gated(context, kAdds);
    const RowLinearCall call = product_.Read(context, {kAdds + 2, "gate", gated.up.present ? 1 : 2, kAdds});
    Addition addition;
    if constexpr (kAdds) addition = ResidualCall(context, call, *sums_).addition();
    if (call.y.Count() == 0) return;
    if (call.tokens == 1) {
      RowLinearArguments made = {};
      made.x = gated.gate.data;
      made.other = gated.Up<uint16_t>();
      made.residual = addition.residual;
      made.squares = addition.squares;
      product_.MultiplyMade(context, call, made);
      return;
    }
    const Scratch scratch(context, allocator_, call.tokens * call.inputs * kElementBytes, true);
    Tensor h = gated.h;
    h.data = scratch.As<void>();
    gated_.Launch(context, gated, h);
    product_.Multiply(context, call, h.data, addition);
  }

 private:
  const Allocator allocator_;
  const GatedKernels gated_;
  const RowProduct product_;
  std::optional<SumKernels> sums_;
};

template <ElementType kType, int kBits>
void Define(std::vector<OpDefinition>& definitions, const char* const (&names)[5]) {
  const auto define = [&](const char* name, std::vector<IoType> ahead, std::vector<IoType> outputs, KernelFactory create) {
    const std::vector<IoType> weight = kBits > 0 ? CodeTypes() : std::vector<IoType>{{kType}};
    definitions.emplace_back(name, kCudaProvider, RowLinearInputs(std::move(ahead), kType, weight), std::move(outputs),
                             create);
  };
  define(names[0], {{kType}, {kType}, {kType}}, {{kType}, {kType}}, Create<NormRowLinear<kType, kBits>>);
  define(names[1], {{kType}, {kFloat}, {kType}}, {{kType}}, Create<RmsRowLinear<kType, kBits>>);
  define(names[2], {{kType}, {kType, true}}, {{kType}}, Create<GatedRowLinear<kType, kBits, false>>);
  define(names[3], {{kType}, {kType}, {kType, true}}, {{kType}, {kFloat}}, Create<GatedRowLinear<kType, kBits, true>>);
  define(names[4], {{kType}, {kType}}, {{kType}, {kFloat}}, Create<RowLinearAdd<kType, kBits>>);
}

template <ElementType kType>
void DefineAll(std::vector<OpDefinition>& definitions) {
  definitions.emplace_back("RmsNorm", kCudaProvider, std::vector<IoType>{{kType}, {kFloat}, {kType}},
                           std::vector<IoType>{{kType}}, Create<RmsNorm<kType>>);
  Define<kType, 0>(definitions,
                   {"NormRowLinear", "RmsRowLinear", "GatedRowLinear", "GatedRowLinearAdd", "RowLinearAdd"});
  Define<kType, 4>(definitions,
                   {"NormRowLinear4", "RmsRowLinear4", "GatedRowLinear4", "GatedRowLinearAdd4", "RowLinearAdd4"});
  Define<kType, 8>(definitions,
                   {"NormRowLinear8", "RmsRowLinear8", "GatedRowLinear8", "GatedRowLinearAdd8", "RowLinearAdd8"});
}

}  // namespace

std::vector<OpDefinition> FusedRowLinearOnCuda() {
  std::vector<OpDefinition> definitions;
  DefineAll<kHalf>(definitions);
  DefineAll<kBfloat16>(definitions);
  return definitions;
}

}  // namespace tda
