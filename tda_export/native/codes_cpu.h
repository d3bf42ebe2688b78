// Rows of codes on the CPU, as a Format that row_sums_cpu.h and row_panels_cpu.h reach them through.
//
// A vector of 32-bit words holds kPerLane codes a lane, in their natural order: the k-th codes of all lanes are one shift
// away, and one multiplication by the lanes' scales adds them to sums that lie in the order (k, lane). Scales come times
// the row's value, zero points are summed by group apart, so that a code itself is what is multiplied:
//
//   sum over rows i of x[i] * scale * (code - zero) = sum of (x[i] * scale) * code - sum of (x[i] * scale) * zero
#pragma once

#include <algorithm>

#include "half.h"
#include "row_list.h"

namespace tda {

constexpr int64_t kSmallestGroup = 32;

#if defined(__GNUC__) && !defined(__clang__)
#define TDA_SHUFFLES 1  // of vectors by vectors
#else
#define TDA_SHUFFLES 0
#endif

// The vectors of a block: kLanes words, each of kPerLane codes.
template <int kLanes, int kBits>
struct CodeBlock {
  using V = Lanes<kLanes>;
  using Vector = typename V::Vector;
  using Words = typename V::Words;
  static constexpr int kPerLane = 32 / kBits;
  static constexpr int kColumns = kLanes * kPerLane;

  // Return the k-th code of each lane.
  static TDA_INLINE Vector Codes(Words words, int k) {
    const Words shifted = words >> (kBits * k);
#if TDA_SHUFFLES
    if constexpr (kLanes == 16 && kBits == 4) {  // one instruction, which looks at four bits of each lane
      const Vector table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      return __builtin_shuffle(table, shifted);
    }
#endif
    return __builtin_convertvector(reinterpret_cast<typename V::Integers>(shifted & ((1u << kBits) - 1)), Vector);
  }

  // Which of a block's groups each lane is of.
  static TDA_INLINE Words GroupOfLane(int64_t group) {
    Words of_lane = {};
    for (int lane = 0; lane < kLanes; ++lane) of_lane[lane] = static_cast<uint32_t>(lane * kPerLane / group);
    return of_lane;
  }

  // Give each lane the number of its group; `first` is that of the block's first group, with kLanes floats to read.
  static TDA_INLINE Vector Spread(const float* first, Words of_lane) {
#if TDA_SHUFFLES
    if constexpr (kColumns > kSmallestGroup) return __builtin_shuffle(V::Load(first), of_lane);
#endif
    return Vector{} + first[0];
  }
};

// A matrix of codes, row after row.
template <int kBits>
struct CodeFormat {
  static constexpr int64_t kTileColumns = 2048;  // their sums stay in the first cache
  static constexpr int64_t kTileGroups = kTileColumns / kSmallestGroup;
  static constexpr int64_t kRowsAtOnce = 8;
  static constexpr int64_t kOverread = 16;  // floats that vectors may read past the last group

  // Sums of the zero points of a tile, by group.
  struct Apart {
    float sums[kTileGroups + kOverread] = {};
  };

  int64_t RowBytes() const { return row_bytes + 2 * groups + zero_bytes; }

  // Bytes of the codes of so many columns, all but the last row's end in whole bytes.
  static TDA_INLINE int64_t CodeBytes(int64_t count) { return count * kBits / 8; }

  // Add the rows of a list, in the columns [begin, end) of a tile, to its sums and what is summed apart.
  template <int kLanes>
  TDA_INLINE void AddRows(const RowList& list, int64_t begin, int64_t end, float* sums, Apart& apart) const {
    float scales_of[kRowsAtOnce][kTileGroups + kOverread];
    const uint8_t* first[kRowsAtOnce];
    const uint8_t* ahead[kRowsAtOnce];
    const int64_t first_group = begin / group, tile_groups = (end - begin + group - 1) / group;
    for (int64_t i = 0; i < list.count; i += kRowsAtOnce) {
      const int64_t count = std::min(kRowsAtOnce, list.count - i);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t row = list.At(i + r), later = list.Ahead(i + r);
        first[r] = codes + row * row_bytes + CodeBytes(begin);
        ahead[r] = codes + later * row_bytes + CodeBytes(begin);
        const uint16_t* later_scales = scales + later * groups + first_group;
        for (int64_t g = 0; g < tile_groups; g += 32) __builtin_prefetch(later_scales + g);
        __builtin_prefetch(zeros + later * zero_bytes + CodeBytes(first_group));
        ScaleGroups(scales + row * groups + first_group, zeros + row * zero_bytes + CodeBytes(first_group),
                    tile_groups, list.values[i + r], scales_of[r], apart.sums);
      }
      AddBlocks<kLanes>(first, ahead, scales_of, count, 0, end - begin, sums);
    }
  }

  // Subtract what was summed apart from the sums of the columns [begin, end).
  template <int kLanes>
  TDA_INLINE void Complete(int64_t begin, int64_t end, float* sums, const Apart& apart) const {
    SubtractZeros<kLanes>(0, end - begin, sums, apart.sums);
  }

  // Write the sums of a tile of so many columns in the columns' order.
  template <int kLanes>
  static TDA_INLINE void InOrder(const float* sums, int64_t columns, float* y) {
    using Block = CodeBlock<kLanes, kBits>;
    int64_t at = 0;
    for (; at + Block::kColumns <= columns; at += Block::kColumns) {
      for (int lane = 0; lane < kLanes; ++lane) {
        for (int k = 0; k < Block::kPerLane; ++k) y[at + lane * Block::kPerLane + k] = sums[at + k * kLanes + lane];
      }
    }
    if constexpr (kLanes > 4) {
      InOrder<kLanes / 2>(sums + at, columns - at, y + at);
    } else {
      std::copy_n(sums + at, columns - at, y + at);
    }
  }

  // Return code `column` of a row of codes.
  static TDA_INLINE float Code(const uint8_t* row, int64_t column) {
    if constexpr (kBits == 8) return row[column];
    return static_cast<float>(row[column / 2] >> 4 * (column % 2) & 15);
  }

  // Multiply the scales of `count` groups with `value`, and add what that makes of the groups' zero points to `sums`.
  static TDA_INLINE void ScaleGroups(const uint16_t* __restrict scales, const uint8_t* __restrict zeros, int64_t count,
                                     float value, float* __restrict scaled, float* __restrict sums) {
    for (int64_t g = 0; g < count; ++g) scaled[g] = HalfToFloat(scales[g]) * value;
    if constexpr (kBits == 8) {
      for (int64_t g = 0; g < count; ++g) sums[g] += scaled[g] * static_cast<float>(zeros[g]);
    } else {
      int64_t pair = 0;
      for (; 2 * pair + 1 < count; ++pair) {
        sums[2 * pair] += scaled[2 * pair] * static_cast<float>(zeros[pair] & 15);
        sums[2 * pair + 1] += scaled[2 * pair + 1] * static_cast<float>(zeros[pair] >> 4);
      }
      if (count % 2) sums[count - 1] += scaled[count - 1] * static_cast<float>(zeros[pair] & 15);
    }
  }

  template <int kLanes>
  TDA_INLINE void AddBlocks(const uint8_t* const* first, const uint8_t* const* ahead,
                            const float (*scales_of)[kTileGroups + kOverread], int64_t count, int64_t at, int64_t end,
                            float* sums) const {
    using Block = CodeBlock<kLanes, kBits>;
    using V = typename Block::V;
    constexpr int kPerLane = Block::kPerLane;
    const typename V::Words of_lane = Block::GroupOfLane(group);
    for (; at + Block::kColumns <= end; at += Block::kColumns) {
      typename V::Vector totals[kPerLane];
      for (int k = 0; k < kPerLane; ++k) totals[k] = V::Load(sums + at + k * kLanes);
      const int64_t block_group = at / group;
      for (int64_t r = 0; r < count; ++r) {
        __builtin_prefetch(ahead[r] + CodeBytes(at));
        const typename V::Words words = V::LoadWords(first[r] + CodeBytes(at));
        const typename V::Vector scale = Block::Spread(scales_of[r] + block_group, of_lane);
        for (int k = 0; k < kPerLane; ++k) totals[k] += scale * Block::Codes(words, k);
      }
      for (int k = 0; k < kPerLane; ++k) V::Store(sums + at + k * kLanes, totals[k]);
    }
    if constexpr (kLanes > 4) {
      AddBlocks<kLanes / 2>(first, ahead, scales_of, count, at, end, sums);
    } else {
      for (; at < end; ++at) {
        for (int64_t r = 0; r < count; ++r) sums[at] += scales_of[r][at / group] * Code(first[r], at);
      }
    }
  }

  template <int kLanes>
  TDA_INLINE void SubtractZeros(int64_t at, int64_t end, float* sums, const float* zero_sums) const {
    using Block = CodeBlock<kLanes, kBits>;
    using V = typename Block::V;
    const typename V::Words of_lane = Block::GroupOfLane(group);
    for (; at + Block::kColumns <= end; at += Block::kColumns) {
      const typename V::Vector zero_sum = Block::Spread(zero_sums + at / group, of_lane);
      for (int k = 0; k < Block::kPerLane; ++k) {
        V::Store(sums + at + k * kLanes, V::Load(sums + at + k * kLanes) - zero_sum);
      }
    }
    if constexpr (kLanes > 4) {
      SubtractZeros<kLanes / 2>(at, end, sums, zero_sums);
    } else {
      for (; at < end; ++at) sums[at] -= zero_sums[at / group];
    }
  }

  const uint8_t* codes;    // [rows, row_bytes]
  const uint16_t* scales;  // [rows, groups], float16
  const uint8_t* zeros;    // [rows, zero_bytes]
  int64_t columns, group, row_bytes, groups, zero_bytes;
};

}  // namespace tda
