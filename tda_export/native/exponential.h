// exp and tanh of vectors, to about one unit in the last place of a float. A NaN stays one.
#pragma once

#include "vectors.h"

namespace tda {

// e^x = scale (1 + rest), with scale a power of two and rest at most sqrt(2) - 1.
template <int kLanes>
struct PowerOfE {
  using V = Lanes<kLanes>;

  // |x| is at most 87.
  TDA_INLINE explicit PowerOfE(typename V::Vector x) {
    constexpr float kLog2E = 1.44269504f;
    constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // the first has so few digits that n * it is exact
    constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    const typename V::Vector shifted = x * kLog2E + kToInteger;
    const typename V::Vector n = shifted - kToInteger;
    const typename V::Vector r = x - n * kLn2High - n * kLn2Low;  // at most ln(2) / 2: the series ends at r^7
    typename V::Vector series = r * (1.0f / 5040) + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    rest = series * (r * r) + r;
    scale = V::FromBits((V::Bits(shifted) << 23) + 0x3f800000u);
  }

  typename V::Vector scale, rest;
};

// Compute e^x: 0 below -87, near the smallest normal floats, and infinity above 87.
template <int kLanes>
TDA_INLINE typename Lanes<kLanes>::Vector Exp(typename Lanes<kLanes>::Vector x) {
  using Vector = typename Lanes<kLanes>::Vector;
  const PowerOfE<kLanes> power(x);
  const Vector y = power.scale * power.rest + power.scale;
  const Vector zero = {}, infinity = zero + __builtin_inff();
  return x < -87.0f ? zero : (x > 87.0f ? infinity : y);
}

template <int kLanes>
TDA_INLINE typename Lanes<kLanes>::Vector Tanh(typename Lanes<kLanes>::Vector x) {
  using Vector = typename Lanes<kLanes>::Vector;
  const Vector most = Vector{} + 20.0f, twice = x + x;  // beyond it tanh is 1
  const PowerOfE<kLanes> power(twice > most ? most : (twice < -most ? -most : twice));
  const Vector less_one = power.scale * power.rest + (power.scale - 1.0f);  // e^2x - 1
  return less_one / (less_one + 2.0f);
}

}  // namespace tda
