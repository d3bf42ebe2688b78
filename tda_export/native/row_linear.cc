#include "row_linear.h"

namespace tda {
namespace {

enum Input : size_t { kX, kWeight, kRowPrice, kPrice, kBias };

}  // namespace

std::vector<IoType> RowLinearInputs(ElementType type) {
  return {
      {type},        // x
      {type},        // w
      {kFloat},      // row_price
      {kFloat},      // price
      {type, true},  // bias
  };
}

RowLinearCall::RowLinearCall(const KernelContext& context)
    : x(context.Input(kX)),
      weight(context.Input(kWeight)),
      row_price(context.Input(kRowPrice)),
      price(context.Input(kPrice)),
      bias(context.Input(kBias)) {
  if (weight.rank != 2) Fail("w: expected shape [inputs, outputs], got ", weight.Shape());
  inputs = weight.sizes[0];
  outputs = weight.sizes[1];
  if (inputs == 0) Fail("w: a product of no inputs, shape ", weight.Shape());
  if (x.rank == 0 || x.sizes[x.rank - 1] != inputs) {
    Fail("x: expected shape [.., ", inputs, "], as w has ", inputs, " rows, got ", x.Shape());
  }
  if (row_price.rank != 1 || row_price.sizes[0] != inputs) {
    Fail("row_price: expected shape [", inputs, "], one price for each row of w, got ", row_price.Shape());
  }
  if (price.Count() != 1) Fail("price: expected shape [1], got ", price.Shape());
  if (bias.present && (bias.rank != 1 || bias.sizes[0] != outputs)) {
    Fail("bias: expected shape [", outputs, "], got ", bias.Shape());
  }
  tokens = x.Count() / inputs;
  Tensor shape = x;
  shape.sizes[shape.rank - 1] = outputs;
  y = context.OutputLike(0, shape);
}

}  // namespace tda
