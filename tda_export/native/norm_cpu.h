// The RMS norm (arXiv 1910.07467) of a sum on the CPU, for products that make their own input.
#pragma once

#include <cstdint>

namespace tda {

// Return what every element of x + residual [columns] is multiplied with.
float NormScaleOf(const float* x, const float* residual, int64_t columns, float epsilon);

// Store (x + residual) * scale * weight [columns], and the sums themselves, if there is a place for them.
void NormSums(const float* x, const float* residual, const float* weight, int64_t columns, float scale, float* normed,
              float* sums);

}  // namespace tda
