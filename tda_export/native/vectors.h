// A processor's vectors of floats, in GCC's and Clang's notation: code written once for every width. Only the widening
// of smaller numbers is written for specific processors, since compilers do not vectorise it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#define TDA_INLINE inline __attribute__((always_inline))

namespace tda {

// Return a float16's value; the smallest go through integers, since they are no normal floats.
TDA_INLINE float HalfToFloat(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t rebias = 0x38000000;  // 127 - 15, where a float has its exponent
  uint32_t bits = (magnitude << 13) + rebias;
  if (magnitude >= 0x7c00u) bits += rebias;  // infinity and NaN
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  if (magnitude < 0x400u) value = static_cast<float>(magnitude) * 0x1p-24f;
  return half & 0x8000u ? -value : value;
}

// Round to float16, to nearest, ties to even; from 65,520 on the result is infinite.
TDA_INLINE uint16_t FloatToHalf(float value) {
  constexpr uint32_t kInfinity = 0x7f800000, kLeastInfinite = 0x477ff000, kLeastNormal = 0x38800000;
  uint32_t magnitude;
  std::memcpy(&magnitude, &value, sizeof(value));
  const uint32_t sign = magnitude >> 16 & 0x8000u;
  magnitude &= 0x7fffffffu;
  uint32_t half;
  if (magnitude > kInfinity) {
    half = 0x7e00;
  } else if (magnitude >= kLeastInfinite) {
    half = 0x7c00;
  } else if (magnitude < kLeastNormal) {  // multiples of 2^-24, which is the last bit of 0.5
    float sum;
    std::memcpy(&sum, &magnitude, sizeof(sum));
    sum += 0.5f;
    std::memcpy(&half, &sum, sizeof(half));
    half -= 0x3f000000;
  } else {
    half = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
  }
  return static_cast<uint16_t>(sign | half);
}

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
    typedef uint16_t Halves __attribute__((vector_size(4 * lanes)));                            \
    typedef uint16_t AnyHalves __attribute__((vector_size(4 * lanes), aligned(2), may_alias));  \
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
  // Load float16 numbers as floats, bytes as words, and bytes with a sign as floats.
  static TDA_INLINE Vector LoadHalves(const uint16_t* address) {
    Vector values = {};
#if defined(__x86_64__) && defined(__GNUC__)
    if constexpr (kLanes > 4) {
      asm("vcvtph2ps %1, %0" : "=v"(values) : "m"(*reinterpret_cast<const uint16_t(*)[kLanes]>(address)));
      return values;
    }
#endif
#if defined(__aarch64__)
    if constexpr (kLanes == 4) return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(address)));
#endif
    for (int lane = 0; lane < kLanes; ++lane) values[lane] = HalfToFloat(address[lane]);
    return values;
  }
  static TDA_INLINE Words LoadBytes(const uint8_t* address) {
    Words values = {};
#if defined(__x86_64__) && defined(__GNUC__)
    if constexpr (kLanes > 4) {
      asm("vpmovzxbd %1, %0" : "=v"(values) : "m"(*reinterpret_cast<const uint8_t(*)[kLanes]>(address)));
      return values;
    }
#endif
    for (int lane = 0; lane < kLanes; ++lane) values[lane] = address[lane];
    return values;
  }
  static TDA_INLINE Vector LoadSignedBytes(const int8_t* address) {
    Integers values = {};
#if defined(__x86_64__) && defined(__GNUC__)
    if constexpr (kLanes > 4) {
      asm("vpmovsxbd %1, %0" : "=v"(values) : "m"(*reinterpret_cast<const int8_t(*)[kLanes]>(address)));
      return __builtin_convertvector(values, Vector);
    }
#endif
    for (int lane = 0; lane < kLanes; ++lane) values[lane] = address[lane];
    return __builtin_convertvector(values, Vector);
  }
  static TDA_INLINE Words Bits(Vector vector) { return reinterpret_cast<Words>(vector); }
  static TDA_INLINE Vector FromBits(Words bits) { return reinterpret_cast<Vector>(bits); }
  static TDA_INLINE Vector Larger(Vector a, Vector b) { return b > a ? b : a; }  // of a and a NaN, a
  // Return 0, 1, 2 and so on.
  static TDA_INLINE Words Counting() {
    Words lanes = {};
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
    return lanes;
  }
  static TDA_INLINE float Sum(Vector vector) {
    float lanes[kLanes];
    __builtin_memcpy(lanes, &vector, sizeof(vector));
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    return lanes[0];
  }
  static TDA_INLINE float Largest(Vector vector) {
    float lanes[kLanes];
    __builtin_memcpy(lanes, &vector, sizeof(vector));
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) lanes[lane] = lanes[lane + half] > lanes[lane] ? lanes[lane + half] : lanes[lane];
    }
    return lanes[0];
  }
  // Write the sums of four vectors, each added up as Sum does. Wider vectors are there only where compilers can shuffle.
  static TDA_INLINE void SumsOfFour(const Vector (&of)[4], float* sums) {
    if constexpr (kLanes == 16) {
      const Vector of_0_1 = __builtin_shufflevector(of[0], of[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                            __builtin_shufflevector(of[0], of[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
      const Vector of_2_3 = __builtin_shufflevector(of[2], of[3], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                            __builtin_shufflevector(of[2], of[3], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
      const Vector quarters =
          __builtin_shufflevector(of_0_1, of_2_3, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
          __builtin_shufflevector(of_0_1, of_2_3, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
      const Vector pairs =
          quarters + __builtin_shufflevector(quarters, quarters, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
      const Vector whole =
          pairs + __builtin_shufflevector(pairs, pairs, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
      Lanes<4>::Store(sums, __builtin_shufflevector(whole, whole, 0, 4, 8, 12));
    } else if constexpr (kLanes == 8) {
      const Vector of_0_1 = __builtin_shufflevector(of[0], of[1], 0, 1, 2, 3, 8, 9, 10, 11) +
                            __builtin_shufflevector(of[0], of[1], 4, 5, 6, 7, 12, 13, 14, 15);
      const Vector of_2_3 = __builtin_shufflevector(of[2], of[3], 0, 1, 2, 3, 8, 9, 10, 11) +
                            __builtin_shufflevector(of[2], of[3], 4, 5, 6, 7, 12, 13, 14, 15);
      const Vector pairs = __builtin_shufflevector(of_0_1, of_2_3, 0, 1, 8, 9, 4, 5, 12, 13) +
                           __builtin_shufflevector(of_0_1, of_2_3, 2, 3, 10, 11, 6, 7, 14, 15);
      Lanes<4>::Store(sums, __builtin_shufflevector(pairs, pairs, 0, 4, 2, 6) +
                                __builtin_shufflevector(pairs, pairs, 1, 5, 3, 7));
    } else {
      for (int k = 0; k < 4; ++k) sums[k] = Sum(of[k]);
    }
  }
};

}  // namespace tda

// Defines kernels for several instruction sets; the processor's own is chosen when the library is loaded:
// TDA_FOR_EACH_TARGET(define), where define(attribute, lanes) defines one function of the same name. TDA_ONE_TARGET, if it
// is defined, is the lanes of the only one, for which the compiler's own options choose the instruction set.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && __GNUC__ >= 12 && !defined(TDA_ONE_TARGET)
#define TDA_FOR_EACH_TARGET(define)                        \
  define(__attribute__((target("arch=x86-64-v4"))), 16)    \
  define(__attribute__((target("arch=x86-64-v3"))), 8)     \
  define(__attribute__((target("default"))), 4)
#elif defined(TDA_ONE_TARGET)
#define TDA_FOR_EACH_TARGET(define) define(, TDA_ONE_TARGET)
#else
#define TDA_FOR_EACH_TARGET(define) define(, 4)
#endif
