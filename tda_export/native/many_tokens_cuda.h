// Products of many tokens on CUDA: cuBLAS multiplies, by a matrix whose codes are expanded into scratch memory, a part of
// the outputs at a time. Every row is read, and dropped inputs are zero: among so many tokens, some token needs nearly
// every row.
#pragma once

#include "cublas.h"
#include "cuda_matrix.h"

namespace tda {

struct ManyTokensCall {
  const void* x;  // [tokens, inputs]
  StoredMatrix matrix;
  bool output_major;  // [outputs, inputs], otherwise [inputs, outputs]
  int64_t tokens, inputs, outputs;
  void* y;                           // [tokens, outputs]
  const float* row_price = nullptr;  // [inputs]; null: every input counts
  const float* price = nullptr;      // [1]
  const void* bias = nullptr;        // [outputs] or null; given with prices alone
  bool every_row = false;            // whether the price is known to drop no input
};

class ManyTokens {
 public:
  ManyTokens(const KernelInfo& info, ElementType type, int bits);

  // Whether a call of so many tokens is faster this way than by kernels that read the matrix once for a few of them.
  bool Pays(int64_t tokens) const { return tokens > (bits_ == 0 ? 16 : 32); }

  void Multiply(const KernelContext& context, const ManyTokensCall& call) const;

 private:
  int64_t OutputsAtOnce(const ManyTokensCall& call) const;
  void Keep(void* stream, const ManyTokensCall& call, void* kept) const;
  void Expand(void* stream, const ManyTokensCall& call, int64_t first, int64_t count, void* elements) const;

  const Allocator allocator_;
  const Cublas cublas_;
  const ElementType type_;
  const int bits_;
  const int64_t multiprocessors_;
  CudaKernel keep_[2], expand_[2];  // by wide loads
};

}  // namespace tda
