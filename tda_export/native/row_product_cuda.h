// A node's product by priced rows on CUDA (device/row_linear.cu): one launch for few tokens, where the GPU has clusters.
// Its x is stored, or, of one token, made by the kernel that multiplies.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "many_tokens_cuda.h"
#include "row_linear.h"
#include "sums_cuda.h"

namespace tda {

struct RowLinearArguments {
  const void* x;
  StoredMatrix weight;
  const float* row_price;
  const float* price;
  const void* bias;
  float* partial;
  unsigned* arrived;
  void* y;
  int tokens, inputs, outputs, counters;
  int early;
  const void* residual;
  float* squares;
  // What x is made from; kernels that find it stored take no more than the arguments above.
  const void* other;
  const void* norm_weight;
  void* sum;
  const float* x_squares;
  float epsilon;
  int wide;
};

// What device/row_linear.cu calls TDA_INPUTS.
enum class RowInputs { kStored, kNormed, kGated, kRms };

class RowLinearKernels;

class RowProduct {
 public:
  // `ahead`: how many inputs the node has ahead of w. `defines` are those that kernels with such inputs need besides.
  RowProduct(const KernelInfo& info, ElementType type, int bits, size_t ahead = 1,
             RowInputs inputs = RowInputs::kStored, const std::vector<std::string>& defines = {});

  RowLinearCall Read(const KernelContext& context, const InputsAhead& ahead = {}) const;

  // Multiply what is stored at `x`, [tokens, inputs], and add the residual, if there is one.
  void Multiply(const KernelContext& context, const RowLinearCall& call, const void* x,
                const Addition& addition = {}) const;

  // Multiply the inputs that `made` tells the kernel to make: of one token, and where there are outputs. Of its other
  // members the kernel reads residual and squares. The bits are those of Multiply.
  void MultiplyMade(const KernelContext& context, const RowLinearCall& call, const RowLinearArguments& made) const;

 private:
  StoredMatrix Matrix(const RowLinearCall& call) const;
  void Launch(const KernelContext& context, const RowLinearCall& call, const RowLinearKernels& kernels,
              RowLinearArguments arguments) const;

  const Allocator allocator_;
  const bool early_;
  const bool every_row_;  // the price is the same in every call, and drops no row
  const ManyTokens many_tokens_;
  std::optional<CodeLayout> layout_;  // where there are codes
  const RowLinearKernels* stored_;    // kept for the process, as are those below
  const RowLinearKernels* made_;
};

}  // namespace tda
