// A processor's vectors of floats, in GCC's and Clang's notation: code written once for every width.
#pragma once

#define TDA_INLINE inline __attribute__((always_inline))

namespace tda {

// A vector of kLanes floats, and the same at any address.
template <int kLanes>
struct VectorOf;
template <>
struct VectorOf<4> {
  typedef float Type __attribute__((vector_size(16)));
  typedef float Unaligned __attribute__((vector_size(16), aligned(4)));
};
template <>
struct VectorOf<8> {
  typedef float Type __attribute__((vector_size(32)));
  typedef float Unaligned __attribute__((vector_size(32), aligned(4)));
};
template <>
struct VectorOf<16> {
  typedef float Type __attribute__((vector_size(64)));
  typedef float Unaligned __attribute__((vector_size(64), aligned(4)));
};

template <int kLanes>
struct Lanes {
  using Vector = typename VectorOf<kLanes>::Type;
  using Unaligned = typename VectorOf<kLanes>::Unaligned;

  static TDA_INLINE Vector Load(const float* address) { return *reinterpret_cast<const Unaligned*>(address); }
  static TDA_INLINE void Store(float* address, Vector vector) { *reinterpret_cast<Unaligned*>(address) = vector; }
  static TDA_INLINE float Sum(Vector vector) {
    float lanes[kLanes];
    __builtin_memcpy(lanes, &vector, sizeof(vector));
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    return lanes[0];
  }
};

}  // namespace tda
