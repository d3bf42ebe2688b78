// Floats as integers of three digits, each a signed byte, so that a processor's products of bytes multiply them with
// codes:
//
//   x = step * (d0 + 256 d1 + 65536 d2), rounded to a whole number of steps; -128 <= d <= 127
//
// A step is a power of two, and the largest |x| has between 2^21 and 2^22 of them, nearly float32's own precision. Sums of
// products are exact: they do not depend on the order of the rows, or on what other rows are there.
#pragma once

#include <algorithm>
#include <cmath>

#include "codes_cpu.h"

namespace tda {

constexpr int kDigits = 3;
constexpr int64_t kTokensByDigits = 16;  // in a call of more, floats are unpacked once for all of them
constexpr int kStepBits = 22;
constexpr float kSmallestMost = 1e-25f;  // below it, steps are no normal floats

// Return the step for numbers up to `most`, positive finite ones; for small ones that of kSmallestMost.
template <int kLanes>
TDA_INLINE typename Lanes<kLanes>::Vector StepsFor(typename Lanes<kLanes>::Vector most) {
  using V = Lanes<kLanes>;
  const auto bits = V::Bits(V::Larger(typename V::Vector{} + kSmallestMost, most)) & 0x7f800000u;
  return V::FromBits(bits - (static_cast<uint32_t>(kStepBits - 1) << 23));
}

// Whether there is code for products of bytes with codes of kBits in vectors of kLanes words. With eight lanes, sums of
// two products with codes of 8 bits do not fit AVX2's 16 bits. Clang, and GCC before 12, would read code for vectors that
// they do not have even where it is not used.
#if TDA_SHUFFLES && defined(__x86_64__) && __GNUC__ >= 12
#define TDA_BYTE_PRODUCTS 1
#else
#define TDA_BYTE_PRODUCTS 0
#endif

#if TDA_BYTE_PRODUCTS
template <int kLanes, int kBits>
constexpr bool kByteProducts = kLanes == 16 || (kLanes == 8 && kBits == 4);
#else
template <int kLanes, int kBits>
constexpr bool kByteProducts = false;
#endif

// Whether the processor can run it.
template <int kLanes>
TDA_INLINE bool HasByteProducts() {
#if defined(__x86_64__)
  if constexpr (kLanes == 16) return __builtin_cpu_supports("avx512vnni");
#endif
  return true;
}

// Four bytes a lane, in the processor's own instructions, which compilers do not make of vectors in C++. Where there are no
// products of bytes, there is only a declaration.
template <int kLanes>
struct Bytes;

#if TDA_BYTE_PRODUCTS
template <int kLanes>
struct Bytes {
  using V = Lanes<kLanes>;
  using Words = typename V::Words;
  using Integers = typename V::Integers;

#define TDA_OF_TWO(Name, instruction)                             \
  static TDA_INLINE Words Name(Words a, Words b) {                \
    Words result;                                                 \
    asm(instruction " %2, %1, %0" : "=v"(result) : "v"(a), "v"(b)); \
    return result;                                                \
  }
  // Interleave elements of a and b: of each 16 bytes, the lower or the upper eight of both.
  TDA_OF_TWO(LowBytes, "vpunpcklbw")
  TDA_OF_TWO(HighBytes, "vpunpckhbw")
  TDA_OF_TWO(LowPairs, "vpunpcklwd")
  TDA_OF_TWO(HighPairs, "vpunpckhwd")
  TDA_OF_TWO(LowWords, "vpunpckldq")
  TDA_OF_TWO(HighWords, "vpunpckhdq")
  TDA_OF_TWO(LowDoubleWords, "vpunpcklqdq")
  TDA_OF_TWO(HighDoubleWords, "vpunpckhqdq")
#undef TDA_OF_TWO

  // Add the products of unsigned codes with signed digits, the four of a lane together.
  static TDA_INLINE Integers AddProducts(Integers sum, Words codes, Words digits) {
    if constexpr (kLanes == 16) {
      asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(digits));
      return sum;
    } else {
      const Words ones = Words{} + 0x00010001u;
      Words pairs;
      asm("vpmaddubsw %2, %1, %0" : "=v"(pairs) : "v"(codes), "v"(digits));
      asm("vpmaddwd %2, %1, %0" : "=v"(pairs) : "v"(pairs), "v"(ones));
      return sum + reinterpret_cast<Integers>(pairs);
    }
  }

  // Return codes of four bits of four rows, one row's in each byte of a lane, a column's in each lane.
  static TDA_INLINE Words CodesInOrder(const uint8_t* const (&rows)[4]) {
    typedef uint8_t Sixteen __attribute__((vector_size(16)));
    typedef uint16_t Pairs __attribute__((vector_size(16)));
    typedef uint64_t Both __attribute__((vector_size(4 * kLanes)));  // of two columns
    Sixteen of[4];
    for (int r = 0; r < 4; ++r) {
      uint64_t codes = 0;
      std::memcpy(&codes, rows[r], kLanes / 2);
      of[r] = reinterpret_cast<Sixteen>(__extension__(__attribute__((vector_size(16))) uint64_t){codes, 0});
    }
    const auto interleaved = [](Sixteen a, Sixteen b) __attribute__((always_inline)) {
      return reinterpret_cast<Pairs>(__builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
    };
    const Pairs of_0_1 = interleaved(of[0], of[1]), of_2_3 = interleaved(of[2], of[3]);
    const Pairs low = __builtin_shufflevector(of_0_1, of_2_3, 0, 8, 1, 9, 2, 10, 3, 11);
    Both both;
    if constexpr (kLanes == 16) {
      const Pairs high = __builtin_shufflevector(of_0_1, of_2_3, 4, 12, 5, 13, 6, 14, 7, 15);
      const auto all = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      asm("vpmovzxdq %1, %0" : "=v"(both) : "v"(all));
    } else {
      asm("vpmovzxdq %1, %0" : "=v"(both) : "v"(low));
    }
    return reinterpret_cast<Words>(both | both << 28) & 0x0f0f0f0fu;
  }

  // Return x in steps, its digits plus 128 as the lower three bytes of a lane. Floats from 2^23 to 2^24 are whole numbers,
  // and their bits count them.
  static TDA_INLINE Words InSteps(typename V::Vector x, typename V::Vector per_step) {
    constexpr float kMiddle = 3 << kStepBits;
    return V::Bits(x * per_step + kMiddle) + (0x00808080u - (1u << kStepBits));
  }

  // Of four vectors that InSteps made, collect a digit: byte i of a lane is that of vector i.
  template <int kDigit>
  static TDA_INLINE Words Digit(const Words (&of)[4]) {
    constexpr uint32_t kEven = 0x00ff00ffu, kLow = 0xffffu;
    Words pairs[2];  // of two vectors: the digit of both in the lower or the upper half of a lane
    for (int i = 0; i < 2; ++i) {
      const Words a = of[2 * i], b = of[2 * i + 1];
      pairs[i] = kDigit == 1 ? (a >> 8 & kEven) | (b & ~kEven) : (a & kEven) | (b << 8 & ~kEven);
    }
    const Words all = kDigit == 2 ? (pairs[0] >> 16) | (pairs[1] & ~kLow) : (pairs[0] & kLow) | pairs[1] << 16;
    return all ^ 0x80808080u;
  }

  // Return the sum of digits' sums, in steps.
  static TDA_INLINE typename V::Vector Value(const Integers (&sums)[kDigits]) {
    using Vector = typename V::Vector;
    const Vector high = __builtin_convertvector(sums[2], Vector) * 256.0f + __builtin_convertvector(sums[1], Vector);
    return high * 256.0f + __builtin_convertvector(sums[0], Vector);
  }
};
#endif

}  // namespace tda
