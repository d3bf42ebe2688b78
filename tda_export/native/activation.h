// The activation functions of FFNs.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>

namespace tda {

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu };

Activation ParseActivation(const std::string& name);

inline float Activate(Activation activation, float value) {
  switch (activation) {
    case Activation::kSilu:
      return value / (1.0f + std::exp(-value));
    case Activation::kGelu:
      return 0.5f * value * (1.0f + std::erf(value * 0.70710678f));
    case Activation::kGeluTanh:
      return 0.5f * value * (1.0f + std::tanh(0.79788456f * (value + 0.044715f * value * value * value)));
    case Activation::kRelu:
      return std::max(value, 0.0f);
  }
  return 0.0f;
}

}  // namespace tda
