#include "norm_cpu.h"

#include <cmath>

#include "vectors.h"

namespace tda {
namespace {

constexpr int kAccumulators = 4;  // so that additions do not wait for one another

template <int kLanes>
TDA_INLINE float AddSquaresOf(const float* x, const float* residual, int64_t columns) {
  using V = Lanes<kLanes>;
  typename V::Vector squares[kAccumulators] = {};
  int64_t i = 0;
  for (; i + kAccumulators * kLanes <= columns; i += kAccumulators * kLanes) {
    for (int a = 0; a < kAccumulators; ++a) {
      const auto sum = V::Load(x + i + a * kLanes) + V::Load(residual + i + a * kLanes);
      squares[a] += sum * sum;
    }
  }
  const auto all = (squares[0] + squares[1]) + (squares[2] + squares[3]);
  float total = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) total += all[lane];
  for (; i < columns; ++i) total += (x[i] + residual[i]) * (x[i] + residual[i]);
  return total;
}

template <int kLanes>
TDA_INLINE void ScaleSumsOf(const float* x, const float* residual, const float* weight, int64_t columns, float scale,
                            float* normed, float* sums) {
  using V = Lanes<kLanes>;
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    const auto sum = V::Load(x + i) + V::Load(residual + i);
    if (sums != nullptr) V::Store(sums + i, sum);
    V::Store(normed + i, sum * scale * V::Load(weight + i));
  }
  for (; i < columns; ++i) {
    const float sum = x[i] + residual[i];
    if (sums != nullptr) sums[i] = sum;
    normed[i] = sum * scale * weight[i];
  }
}

#define TDA_NORM(attribute, lanes)                                                                                      \
  attribute float AddSquares(const float* x, const float* residual, int64_t columns) {                                  \
    return AddSquaresOf<lanes>(x, residual, columns);                                                                   \
  }                                                                                                                     \
  attribute void ScaleSums(const float* x, const float* residual, const float* weight, int64_t columns, float scale,    \
                           float* normed, float* sums) {                                                                \
    ScaleSumsOf<lanes>(x, residual, weight, columns, scale, normed, sums);                                              \
  }
TDA_FOR_EACH_TARGET(TDA_NORM)

}  // namespace

float NormScaleOf(const float* x, const float* residual, int64_t columns, float epsilon) {
  return 1.0f / std::sqrt(AddSquares(x, residual, columns) / static_cast<float>(columns) + epsilon);
}

void NormSums(const float* x, const float* residual, const float* weight, int64_t columns, float scale, float* normed,
              float* sums) {
  ScaleSums(x, residual, weight, columns, scale, normed, sums);
}

}  // namespace tda
