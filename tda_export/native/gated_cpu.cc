#include "gated_cpu.h"

#include "exponential.h"

namespace tda {
namespace {

template <int kLanes>
TDA_INLINE void GateOf(Activation activation, const float* gate, const float* up, int64_t neurons, float* h) {
  using V = Lanes<kLanes>;
  const auto all = [&](auto activate) __attribute__((always_inline)) {
    int64_t i = 0;
    for (; i + kLanes <= neurons; i += kLanes) V::Store(h + i, activate(V::Load(gate + i)) * V::Load(up + i));
    for (; i < neurons; ++i) h[i] = activate(typename V::Vector{} + gate[i])[0] * up[i];
  };
  switch (activation) {
    case Activation::kSilu:
      return all([](auto g) __attribute__((always_inline)) { return g / (1.0f + Exp<kLanes>(-g)); });
    case Activation::kGeluTanh:
      return all([](auto g) __attribute__((always_inline)) {
        return 0.5f * g * (1.0f + Tanh<kLanes>(0.79788456f * (g + 0.044715f * g * g * g)));
      });
    default:
      for (int64_t i = 0; i < neurons; ++i) h[i] = Activate(activation, gate[i]) * up[i];
  }
}

#define TDA_GATE(attribute, lanes)                                                                                  \
  attribute void Gate(Activation activation, const float* gate, const float* up, int64_t neurons, float* h) {       \
    GateOf<lanes>(activation, gate, up, neurons, h);                                                                \
  }
TDA_FOR_EACH_TARGET(TDA_GATE)

}  // namespace

void MultiplyGated(Activation activation, const float* gate, const float* up, int64_t neurons, float* h) {
  Gate(activation, gate, up, neurons, h);
}

}  // namespace tda
