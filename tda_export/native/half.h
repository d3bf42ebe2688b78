// float16 as floats, in plain arithmetic that compilers turn into vectors.
#pragma once

#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace tda {

// Every bit pattern has its exact value; the smallest go through integers, since they are no normal floats.
TDA_INLINE float HalfToFloat(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t rebias = 0x38000000;  // 127 - 15, where a float has its exponent
  uint32_t bits = (magnitude << 13) + rebias;
  bits += magnitude >= 0x7c00u ? rebias : 0u;  // infinity and NaN
  const float tiny = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  uint32_t tiny_bits;
  std::memcpy(&tiny_bits, &tiny, sizeof(tiny));
  bits = (magnitude < 0x400u ? tiny_bits : bits) | (half & 0x8000u) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace tda
