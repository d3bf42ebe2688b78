// A processor's vectors of floats, in GCC's and Clang's notation: code written once for every width.
#pragma once

#include <cstdint>

#define TDA_INLINE inline __attribute__((always_inline))

namespace tda {

// A vector of kLanes floats, and the same at any address; words and integers of as many bits.
template <int kLanes>
struct VectorOf;
#define TDA_VECTOR_OF(lanes)                                                                    \
  template <>                                                                                   \
  struct VectorOf<lanes> {                                                                      \
    typedef float Type __attribute__((vector_size(4 * lanes)));                                 \
    typedef float Unaligned __attribute__((vector_size(4 * lanes), aligned(4)));                \
    typedef uint32_t Words __attribute__((vector_size(4 * lanes)));                             \
    typedef uint32_t AnyWords __attribute__((vector_size(4 * lanes), aligned(1), may_alias));   \
    typedef int32_t Integers __attribute__((vector_size(4 * lanes)));                           \
  };
TDA_VECTOR_OF(4)
TDA_VECTOR_OF(8)
TDA_VECTOR_OF(16)
#undef TDA_VECTOR_OF

template <int kLanes>
struct Lanes {
  using Vector = typename VectorOf<kLanes>::Type;
  using Unaligned = typename VectorOf<kLanes>::Unaligned;
  using Words = typename VectorOf<kLanes>::Words;
  using Integers = typename VectorOf<kLanes>::Integers;

  static TDA_INLINE Vector Load(const float* address) { return *reinterpret_cast<const Unaligned*>(address); }
  static TDA_INLINE void Store(float* address, Vector vector) { *reinterpret_cast<Unaligned*>(address) = vector; }
  static TDA_INLINE Words LoadWords(const uint8_t* address) {
    return *reinterpret_cast<const typename VectorOf<kLanes>::AnyWords*>(address);
  }
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
