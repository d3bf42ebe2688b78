// Rows of keys or values in a cache of floats, of float16 or of 8-bit codes, and the conversion of a head to these.
//
// A row of codes c represents scale * c, with one scale per row. Keys are multiplied by a Hadamard matrix before they
// are stored, which spreads their few large elements over all elements; queries are multiplied by it too.
#pragma once

#include <cmath>

#include "vectors.h"

namespace tda {

struct FloatRows {
  using Element = float;
  static constexpr bool kConverted = false, kScaled = false;
  static TDA_INLINE float Value(float element) { return element; }
  template <int kLanes>
  static TDA_INLINE typename Lanes<kLanes>::Vector Load(const float* address) {
    return Lanes<kLanes>::Load(address);
  }

  const float* elements;  // [rows, size]
};

struct HalfRows {
  using Element = uint16_t;
  static constexpr bool kConverted = true, kScaled = false;
  static TDA_INLINE float Value(uint16_t element) { return HalfToFloat(element); }
  template <int kLanes>
  static TDA_INLINE typename Lanes<kLanes>::Vector Load(const uint16_t* address) {
    return Lanes<kLanes>::LoadHalves(address);
  }

  const uint16_t* elements;  // [rows, size]
};

struct CodeRows {
  using Element = int8_t;
  static constexpr bool kConverted = true, kScaled = true;
  static TDA_INLINE float Value(int8_t element) { return element; }
  template <int kLanes>
  static TDA_INLINE typename Lanes<kLanes>::Vector Load(const int8_t* address) {
    return Lanes<kLanes>::LoadSignedBytes(address);
  }

  const int8_t* elements;  // [rows, size]
  const float* scales;     // [rows]
};

// Multiply a head by the Hadamard matrix: Sylvester's, of the largest power of two that divides the size, in blocks.
TDA_INLINE void SpreadHead(float* x, int64_t size) {
  const int64_t block = size & -size;
  for (int64_t half = 1; half < block; half *= 2) {
    for (int64_t start = 0; start < size; start += 2 * half) {
      for (int64_t i = start; i < start + half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
    }
  }
  const float unit = 1.0f / std::sqrt(static_cast<float>(block));
  for (int64_t i = 0; i < size; ++i) x[i] *= unit;
}

TDA_INLINE void RoundHead(const float* x, int64_t size, uint16_t* halves) {
  for (int64_t i = 0; i < size; ++i) halves[i] = FloatToHalf(x[i]);
}

// Round a head to codes, to nearest, ties to even, and return its scale: NaN where the head is not finite.
TDA_INLINE float QuantizeHead(const float* x, int64_t size, int8_t* codes) {
  constexpr float kLargest = 127.0f;
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  float largest = 0.0f, spoiled = 0.0f;
  for (int64_t i = 0; i < size; ++i) {
    const float magnitude = std::fabs(x[i]);
    largest = magnitude > largest ? magnitude : largest;
    spoiled += x[i] - x[i];
  }
  const float scale = largest / kLargest + spoiled;
  const float divisor = scale > 0.0f ? scale : 1.0f;
  for (int64_t i = 0; i < size; ++i) {
    const float code = (x[i] / divisor + kToInteger) - kToInteger;
    codes[i] = static_cast<int8_t>(code > -kLargest ? (code < kLargest ? code : kLargest) : -kLargest);
  }
  return scale;
}

}  // namespace tda
