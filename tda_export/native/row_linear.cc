#include "row_linear.h"

#include <utility>

namespace tda {
namespace {

constexpr size_t kRowPrice = 0, kPrice = 1, kBias = 2;  // behind the tensors of the matrix

}  // namespace

std::vector<IoType> RowLinearInputs(std::vector<IoType> x, ElementType type, std::vector<IoType> weight) {
  std::vector<IoType> inputs = std::move(x);
  for (const IoType& tensor : weight) inputs.push_back(tensor);
  inputs.push_back({kFloat});      // row_price
  inputs.push_back({kFloat});      // price
  inputs.push_back({type, true});  // bias
  return inputs;
}

RowLinearCall::RowLinearCall(const KernelContext& context, const InputsAhead& ahead, size_t weight_tensors)
    : x(context.Input(ahead.place)),
      weight(context.Input(ahead.count)),
      row_price(context.Input(ahead.count + weight_tensors + kRowPrice)),
      price(context.Input(ahead.count + weight_tensors + kPrice)),
      bias(context.Input(ahead.count + weight_tensors + kBias)) {}

RowLinearCall::RowLinearCall(const KernelContext& context, const InputsAhead& ahead) : RowLinearCall(context, ahead, 1) {
  if (weight.rank != 2) Fail("w: expected shape [inputs, outputs], got ", weight.Shape());
  outputs = weight.sizes[1];
  CheckAndAllocate(context, ahead);
}

RowLinearCall::RowLinearCall(const KernelContext& context, const CodeLayout& layout, const InputsAhead& ahead)
    : RowLinearCall(context, ahead, 3) {
  scales = context.Input(ahead.count + 1);
  zero_points = context.Input(ahead.count + 2);
  layout.Check(weight, scales, zero_points);
  outputs = layout.columns;
  CheckAndAllocate(context, ahead);
}

void RowLinearCall::CheckAndAllocate(const KernelContext& context, const InputsAhead& ahead) {
  inputs = weight.sizes[0];
  if (inputs == 0) Fail("w: a product of no inputs, shape ", weight.Shape());
  const int64_t width = ahead.parts * inputs;
  if (x.rank == 0 || x.sizes[x.rank - 1] != width) {
    Fail(ahead.name, ": expected shape [.., ", width, "], as w has ", inputs, " rows", ahead.parts > 1 ? " and there is no up" : "",
         ", got ", x.Shape());
  }
  if (row_price.rank != 1 || row_price.sizes[0] != inputs) {
    Fail("row_price: expected shape [", inputs, "], one price for each row of w, got ", row_price.Shape());
  }
  if (price.Count() != 1) Fail("price: expected shape [1], got ", price.Shape());
  if (bias.present && (bias.rank != 1 || bias.sizes[0] != outputs)) {
    Fail("bias: expected shape [", outputs, "], got ", bias.Shape());
  }
  tokens = x.Count() / width;
  Tensor shape = x;
  shape.sizes[shape.rank - 1] = outputs;
  y = context.OutputLike(0, shape);
}

void CheckNorm(const RowLinearCall& call, const Tensor& residual, const Tensor& weight) {
  CheckNormWeight(call, weight);
  if (residual.Count() != call.x.Count()) {
    Fail("residual: expected shape ", call.x.Shape(), ", got ", residual.Shape());
  }
}

void CheckNormWeight(const RowLinearCall& call, const Tensor& weight) {
  if (weight.Count() != call.inputs) {
    Fail("norm_weight: expected shape [", call.inputs, "], as w has ", call.inputs, " rows, got ", weight.Shape());
  }
}

}  // namespace tda
