// Sums of a product and a residual, whose squares are kept for the norm that follows, on CUDA. A product of few tokens adds
// its residual itself (device/row_totals.cuh), and one of one token makes its norm itself; these kernels are for more.
#pragma once

#include "cuda_module.h"

namespace tda {

// A square part is the sum of the squares of so many neighbouring columns; the last part may have fewer.
constexpr int64_t kSquareColumns = 32;

constexpr int64_t SquareParts(int64_t columns) { return (columns + kSquareColumns - 1) / kSquareColumns; }

class SumKernels;

// What is added to a product [tokens, columns], once it is rounded, where the squares of the sums go, [tokens,
// SquareParts(columns)], and the kernels for many tokens. All are null where nothing is added.
struct Addition {
  const void* residual = nullptr;
  float* squares = nullptr;
  const SumKernels* kernels = nullptr;
};

class SumKernels {
 public:
  explicit SumKernels(ElementType type);

  // Add to the product that lies at y, which has columns.
  void Add(const KernelContext& context, int64_t tokens, int64_t columns, const Addition& addition, void* y) const;

  // Store the norms of sums [tokens, columns], given their squares.
  void Norm(const KernelContext& context, int64_t tokens, int64_t columns, const void* sums, const float* squares,
            const void* weight, float epsilon, void* normed) const;

 private:
  CudaKernel add_, norm_;
};

}  // namespace tda
