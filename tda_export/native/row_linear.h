// tda::RowLinear, the part that both providers share: its inputs, and what must hold of them.
//
//   y = sum over i of x[i] * w[i, :] + bias,   over the rows i that a token does not drop
//
// A token drops row i where x[i]^2 * row_price[i] < price, in float32. A row of which no token needs anything is not read.
#pragma once

#include "op.h"

namespace tda {

// Types of inputs for weights of `type`.
std::vector<IoType> RowLinearInputs(ElementType type);

struct RowLinearCall {
  // Read and check the inputs of a call.
  explicit RowLinearCall(const KernelContext& context);

  int64_t tokens;   // S
  int64_t inputs;   // rows of w
  int64_t outputs;  // columns of w
  Tensor x, weight, row_price, price, bias, y;
};

}  // namespace tda
