// Rows of codes on the CPU, as a Format through which row_sums_cpu.h and row_panels_cpu.h read them.
//
// A vector of 32-bit words holds kPerLane codes a lane, in their natural order: the k-th codes of all lanes are one shift
// away, and one multiplication by the lanes' scales adds them to sums that lie in the order (k, lane). Scales come times
// the row's value, zero points are summed by group apart, so that a code itself is what is multiplied:
//
//   sum over rows i of x[i] * scale * (code - zero) = sum of (x[i] * scale) * code - sum of (x[i] * scale) * zero
//
// Vectors run over the end of a row into the next one. Their results there are ignored; only pieces at the very end of
// a tensor are copied to a larger buffer.
#pragma once

#include <algorithm>
#include <cstring>

#include "codes.h"
#include "row_list.h"

namespace tda {

constexpr int64_t kSmallestGroup = 32;
constexpr int64_t kMostBlock = 128;  // columns of the widest block
constexpr int64_t kLine = 64;        // bytes of a cache line

#if defined(__GNUC__) && !defined(__clang__)
#define TDA_SHUFFLES 1  // of vectors by vectors
#else
#define TDA_SHUFFLES 0
#endif

// Memory that may be read in whole vectors: a piece of a tensor, or a copy of it where the tensor ends.
template <class T, int kRoom>
struct Piece {
  TDA_INLINE const T* Of(const T* begin, int64_t count, int64_t read, const T* tensor_end) {
    if (begin + read <= tensor_end) return begin;
    std::memcpy(copy, begin, count * sizeof(T));
    return copy;
  }

  T copy[kRoom];
};

// The vectors of a block: kLanes words, each of kPerLane codes.
template <int kLanes, int kBits>
struct CodeBlock {
  using V = Lanes<kLanes>;
  using Vector = typename V::Vector;
  using Words = typename V::Words;
  using Integers = typename V::Integers;
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
    return __builtin_convertvector(reinterpret_cast<Integers>(shifted & ((1u << kBits) - 1)), Vector);
  }

  // The group of each lane of a block.
  static TDA_INLINE Words GroupOfLane(int group_shift) { return V::Counting() * kPerLane >> group_shift; }

  // Give each lane the number of its group; `first` is that of the block's first group, with kLanes floats to read.
  static TDA_INLINE Vector Spread(const float* first, [[maybe_unused]] Words of_lane) {
#if TDA_SHUFFLES
    if constexpr (kColumns > kSmallestGroup) return __builtin_shuffle(V::Load(first), of_lane);
#endif
    return Vector{} + first[0];
  }

#if TDA_SHUFFLES
  // Write a block of sums in the order (lane, k): lanes of the first half of the vectors and those of the second half
  // alternate, again and again.
  static TDA_INLINE void WriteInOrder(const float* sums, float* y) {
    const Words first = V::Counting() / 2 + V::Counting() % 2 * kLanes, second = first + kLanes / 2;
    Vector of[kPerLane], zipped[kPerLane];
    for (int k = 0; k < kPerLane; ++k) of[k] = V::Load(sums + k * kLanes);
    for (int step = 1; step < kPerLane; step *= 2) {
      for (int k = 0; k < kPerLane / 2; ++k) {
        zipped[2 * k] = __builtin_shuffle(of[k], of[k + kPerLane / 2], first);
        zipped[2 * k + 1] = __builtin_shuffle(of[k], of[k + kPerLane / 2], second);
      }
      for (int k = 0; k < kPerLane; ++k) of[k] = zipped[k];
    }
    for (int k = 0; k < kPerLane; ++k) V::Store(y + k * kLanes, of[k]);
  }
#endif

  // Return kLanes codes that follow one another, the first at `address`, as words or as floats.
  static TDA_INLINE Words WordsInOrder(const uint8_t* address) {
    if constexpr (kBits == 8) return V::LoadBytes(address);
    uint32_t low = 0, high = 0;
    std::memcpy(&low, address, std::min(4, kLanes / 2));
    Words words = Words{} + low;
    if constexpr (kLanes == 16) {
      std::memcpy(&high, address + 4, 4);
      words = V::Counting() < 8 ? words : Words{} + high;
    }
    return words >> (V::Counting() % 8 * 4) & 15;
  }
  static TDA_INLINE Vector InOrder(const uint8_t* address) {
    return __builtin_convertvector(reinterpret_cast<Integers>(WordsInOrder(address)), Vector);
  }
};

// A matrix of codes, row after row.
template <int kBits>
struct CodeFormat {
  static constexpr bool kScaled = true;
  static constexpr int kCodeBits = kBits;
  static constexpr int64_t kTileColumns = 2048;  // their sums stay in the first cache, and pieces of rows are long
  static constexpr int64_t kTileGroups = kTileColumns / kSmallestGroup;
  static constexpr int64_t kRowsAtOnce = 8;
  static constexpr int64_t kMostLanes = 16;

  // Sums of the zero points of a tile, by group.
  struct Apart {
    float sums[kTileGroups + kMostLanes] = {};
  };

  CodeFormat(const CodeLayout& layout, const Tensor& weight, const Tensor& scales, const Tensor& zero_points)
      : codes(weight.As<const uint8_t>()),
        scales(scales.As<const uint16_t>()),
        zeros(zero_points.As<const uint8_t>()),
        rows(weight.sizes[0]),
        columns(layout.columns),
        row_bytes(layout.Packed(columns)),
        groups(layout.Groups()),
        zero_bytes(layout.Packed(groups)),
        group_shift(__builtin_ctzll(layout.group)) {}

  int64_t RowBytes() const { return row_bytes + 2 * groups + zero_bytes; }
  // Columns at multiples of which tiles may begin: with a block, and with a byte of zero points.
  int64_t TileUnit() const { return std::max(kMostBlock, int64_t{8 / kBits} << group_shift); }

  static constexpr int64_t CodeBytes(int64_t count) { return (count * kBits + 7) / 8; }

  // Add the rows of a list, in the columns [begin, end) of a tile, to its sums and to the separate sums of zero points.
  template <int kLanes>
  TDA_INLINE void AddRows(const RowList& list, int64_t begin, int64_t end, float* sums, Apart& apart) const {
    using Block = CodeBlock<kLanes, kBits>;
    using V = typename Block::V;
    constexpr int kPerLane = Block::kPerLane;
    Piece<uint8_t, CodeBytes(kTileColumns)> pieces[kRowsAtOnce];
    float scales_of[kRowsAtOnce][kTileGroups + kMostLanes];
    const uint8_t* first[kRowsAtOnce];
    const uint8_t* ahead[kRowsAtOnce];
    const int64_t first_group = begin >> group_shift, tile_groups = ((end - 1) >> group_shift) + 1 - first_group;
    const int64_t blocks = (end - begin + Block::kColumns - 1) / Block::kColumns;
    const int64_t piece_bytes = CodeBytes(end) - CodeBytes(begin);
    const typename V::Words of_lane = Block::GroupOfLane(group_shift);
    for (int64_t i = 0; i < std::min(list.ahead, list.count); ++i) {
      PrefetchGroups(list.At(i), first_group, tile_groups);
      for (int64_t byte = 0; byte < piece_bytes; byte += kLine) {
        __builtin_prefetch(codes + list.At(i) * row_bytes + CodeBytes(begin) + byte);
      }
    }
    for (int64_t i = 0; i < list.count; i += kRowsAtOnce) {
      const int64_t count = std::min(kRowsAtOnce, list.count - i);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t row = list.At(i + r), later = list.Ahead(i + r);
        first[r] = pieces[r].Of(codes + row * row_bytes + CodeBytes(begin), piece_bytes,
                                blocks * Block::kColumns * kBits / 8, codes + rows * row_bytes);
        ahead[r] = codes + later * row_bytes + CodeBytes(begin);
        PrefetchGroups(later, first_group, tile_groups);
        ScaleGroups<kLanes>(row, first_group, tile_groups, list.values[i + r], scales_of[r], apart.sums);
      }
      for (int64_t block = 0; block < blocks; ++block) {
        float* block_sums = sums + block * Block::kColumns;
        const int64_t block_group = block * Block::kColumns >> group_shift;
        const int64_t at = CodeBytes(block * Block::kColumns);
        typename V::Vector totals[kPerLane];
        for (int k = 0; k < kPerLane; ++k) totals[k] = V::Load(block_sums + k * kLanes);
        for (int64_t r = 0; r < count; ++r) {
          __builtin_prefetch(ahead[r] + at);
          const typename V::Words words = V::LoadWords(first[r] + at);
          const typename V::Vector scale = Block::Spread(scales_of[r] + block_group, of_lane);
          for (int k = 0; k < kPerLane; ++k) totals[k] += scale * Block::Codes(words, k);
        }
        for (int k = 0; k < kPerLane; ++k) V::Store(block_sums + k * kLanes, totals[k]);
      }
    }
  }

  // Subtract the separate sums of zero points from the sums of the columns [begin, end).
  template <int kLanes>
  TDA_INLINE void Complete(int64_t begin, int64_t end, float* sums, const Apart& apart) const {
    using Block = CodeBlock<kLanes, kBits>;
    using V = typename Block::V;
    const typename V::Words of_lane = Block::GroupOfLane(group_shift);
    for (int64_t at = 0; at < end - begin; at += Block::kColumns) {
      const typename V::Vector zero_sum = Block::Spread(apart.sums + (at >> group_shift), of_lane);
      for (int k = 0; k < Block::kPerLane; ++k) {
        V::Store(sums + at + k * kLanes, V::Load(sums + at + k * kLanes) - zero_sum);
      }
    }
  }

  // Write the sums of so many columns of a tile, whole blocks of them, in the columns' order.
  template <int kLanes>
  static TDA_INLINE void InOrder(const float* sums, int64_t columns, float* y) {
    using Block = CodeBlock<kLanes, kBits>;
    for (int64_t at = 0; at < columns; at += Block::kColumns) {
#if TDA_SHUFFLES
      if constexpr (kLanes > 4) {
        Block::WriteInOrder(sums + at, y + at);
        continue;
      }
#endif
      for (int lane = 0; lane < kLanes; ++lane) {
        for (int k = 0; k < Block::kPerLane; ++k) y[at + lane * Block::kPerLane + k] = sums[at + k * kLanes + lane];
      }
    }
  }

  // Write the codes from `column` on as floats, those of two vectors of one group; values past the end of the row are
  // undefined.
  template <int kLanes>
  TDA_INLINE void Unpack(int64_t row, int64_t column, float* out) const {
    constexpr int kBytes = CodeBytes(2 * kLanes);
    Piece<uint8_t, kBytes> piece;
    const int64_t rest = std::min<int64_t>(2 * kLanes, columns - column);
    const uint8_t* first =
        piece.Of(codes + row * row_bytes + CodeBytes(column), CodeBytes(rest), kBytes, codes + rows * row_bytes);
    for (int v = 0; v < 2; ++v) {
      Lanes<kLanes>::Store(out + v * kLanes, CodeBlock<kLanes, kBits>::InOrder(first + CodeBytes(v * kLanes)));
    }
  }

  // Return the scale and the zero point of a row's group that has a column.
  TDA_INLINE float Scale(int64_t row, int64_t column) const {
    return HalfToFloat(scales[row * groups + (column >> group_shift)]);
  }
  TDA_INLINE float Zero(int64_t row, int64_t column) const {
    const int64_t at = column >> group_shift;
    const uint8_t* first = zeros + row * zero_bytes;
    return static_cast<float>(kBits == 8 ? first[at] : first[at / 2] >> 4 * (at % 2) & 15);
  }

  TDA_INLINE void PrefetchGroups(int64_t row, int64_t first_group, int64_t count) const {
    const uint16_t* first = scales + row * groups + first_group;
    for (int64_t g = 0; g < count; g += kLine / 2) __builtin_prefetch(first + g);
    __builtin_prefetch(zeros + row * zero_bytes + CodeBytes(first_group));
  }

  // Multiply the scales of a row's groups by `value`, and add their products with the zero points to `sums`.
  template <int kLanes>
  TDA_INLINE void ScaleGroups(int64_t row, int64_t first_group, int64_t count, float value, float* scaled,
                              float* sums) const {
    using V = Lanes<kLanes>;
    for (int64_t g = 0; g < count; g += kLanes) {
      Piece<uint16_t, kLanes> scales_piece;
      Piece<uint8_t, kLanes> zeros_piece;
      const int64_t rest = std::min<int64_t>(kLanes, count - g), at = first_group + g;
      const uint16_t* halves =
          scales_piece.Of(scales + row * groups + at, rest, kLanes, scales + rows * groups);
      const uint8_t* zero_points = zeros_piece.Of(zeros + row * zero_bytes + CodeBytes(at), CodeBytes(rest),
                                                  CodeBytes(kLanes), zeros + rows * zero_bytes);
      const typename V::Vector own = V::LoadHalves(halves) * value;
      V::Store(scaled + g, own);
      V::Store(sums + g, V::Load(sums + g) + own * CodeBlock<kLanes, kBits>::InOrder(zero_points));
    }
  }

  const uint8_t* codes;    // [rows, row_bytes]
  const uint16_t* scales;  // [rows, groups], float16
  const uint8_t* zeros;    // [rows, zero_bytes]
  int64_t rows, columns, row_bytes, groups, zero_bytes;
  int group_shift;  // a group has 1 << group_shift columns
  const LargestScales* largest = nullptr;  // where sums over rows may be of integers
};

}  // namespace tda
