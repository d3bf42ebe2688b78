// tda::RowLinear and its forms for integers, the part that all providers share: inputs and their checks. NormRowLinear and
// GatedRowLinear have other inputs in the place of x.
//
//   y = sum over i of x[i] * w[i, :] + bias,   over the rows i that a token does not drop
//
// A token drops row i where x[i]^2 * row_price[i] < price, in float32. A row that no token needs is not read, except by
// many tokens on CUDA (many_tokens_cuda.h).
#pragma once

#include "codes.h"

namespace tda {

// Types of inputs for activations of `type`: what x comes from, and a matrix of these tensors.
std::vector<IoType> RowLinearInputs(std::vector<IoType> x, ElementType type, std::vector<IoType> weight);

// The number of the input `price` of a node with so many inputs ahead of w, which holds floats or codes.
constexpr size_t PriceInput(size_t ahead, bool codes) { return ahead + (codes ? 3 : 1) + 1; }

// What a node has ahead of w: so many inputs, and among them x, which has a name, a place, and `parts` columns for each row
// of w.
struct InputsAhead {
  size_t count = 1;
  const char* name = "x";
  int64_t parts = 1;
  size_t place = 0;
};

struct RowLinearCall {
  static constexpr size_t kScales = 2;  // the input, where x alone is ahead of w

  // Read and check the inputs of a call: floats, or codes with scales and zero points.
  explicit RowLinearCall(const KernelContext& context, const InputsAhead& ahead = {});
  RowLinearCall(const KernelContext& context, const CodeLayout& layout, const InputsAhead& ahead = {});

  int64_t tokens;   // S
  int64_t inputs;   // rows of w
  int64_t outputs;  // columns of w
  Tensor x, weight, scales, zero_points, row_price, price, bias, y;

 private:
  RowLinearCall(const KernelContext& context, const InputsAhead& ahead, size_t weight_tensors);
  void CheckAndAllocate(const KernelContext& context, const InputsAhead& ahead);
};

// Throw unless the residual has the shape of x, and there is a weight of the norm for each row of w.
void CheckNorm(const RowLinearCall& call, const Tensor& residual, const Tensor& weight);
void CheckNormWeight(const RowLinearCall& call, const Tensor& weight);

}  // namespace tda
