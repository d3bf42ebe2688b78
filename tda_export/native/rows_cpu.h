// Rows of a weight matrix on the CPU, and operations on several rows at once.
//
// A Format says how rows lie in memory. Kernels reach weights through one, and never by address:
//
//   Row At(i)                  row i of the matrix, with
//     Step<kLanes>()             how many columns are read at once, a whole number of vectors
//     Load<kLanes>(column, out)  those columns as vectors of floats
//     Value(column)              one of them
//     Prefetch<kColumns>(column) ask for the memory of kColumns columns early
#pragma once

#include <cstdint>
#include <cstring>

#include "row_list.h"

namespace tda {

constexpr int kRowsAtOnce = 4;
constexpr int kGroupsAhead = 2;  // groups of kRowsAtOnce rows that are asked for early

// float32, row after row.
struct FloatFormat {
  static constexpr int64_t kTileColumns = 1024;  // of which sums stay in the first cache, and the next rows' pieces too
  static constexpr int64_t kRowsAtOnce = tda::kRowsAtOnce;

  struct Row {
    static constexpr int kLineFloats = 16;  // of a cache line
    static constexpr int kVectors = 2;      // read at once

    template <int kLanes>
    static constexpr int Step() {
      return kVectors * kLanes;
    }
    template <int kLanes>
    TDA_INLINE void Load(int64_t column, typename Lanes<kLanes>::Vector (&out)[kVectors]) const {
      for (int v = 0; v < kVectors; ++v) out[v] = Lanes<kLanes>::Load(first + column + v * kLanes);
    }
    TDA_INLINE float Value(int64_t column) const { return first[column]; }
    template <int kColumns>
    TDA_INLINE void Prefetch(int64_t column) const {
      for (int i = 0; i < kColumns; i += kLineFloats) __builtin_prefetch(first + column + i);
    }

    const float* first;
  };

  static constexpr bool kScaled = false;  // nothing is summed apart, and a row has one scale

  struct Apart {};

  TDA_INLINE Row At(int64_t i) const { return {weights + i * columns}; }
  int64_t TileUnit() const { return 8 * Row::kLineFloats; }  // columns at multiples of which tiles may begin
  int64_t RowBytes() const { return columns * int64_t{sizeof(float)}; }

  // Add the rows of a list, in the columns [begin, end), to sums of these columns.
  template <int kLanes>
  TDA_INLINE void AddRows(const RowList& list, int64_t begin, int64_t end, float* sums, Apart&) const;

  template <int kLanes>
  TDA_INLINE void Complete(int64_t, int64_t, float*, const Apart&) const {}

  template <int kLanes>
  static TDA_INLINE void InOrder(const float* sums, int64_t columns, float* y) {
    std::memcpy(y, sums, columns * sizeof(float));
  }

  // Write the columns from `column` on as floats, those of two vectors; values past the end of the row are undefined.
  template <int kLanes>
  TDA_INLINE void Unpack(int64_t row, int64_t column, float* out) const {
    const float* first = weights + row * columns + column;
    if (column + 2 * kLanes <= columns) {
      for (int v = 0; v < 2; ++v) Lanes<kLanes>::Store(out + v * kLanes, Lanes<kLanes>::Load(first + v * kLanes));
    } else {
      std::memcpy(out, first, (columns - column) * sizeof(float));
    }
  }

  const float* weights;
  int64_t columns;
};

// Compute x . row for kCount rows at once, asking for the rows `ahead` meanwhile.
template <int kLanes, int kCount, class Row>
TDA_INLINE void Dots(const float* x, const Row* rows, const Row* ahead, int64_t size, float* products) {
  using V = Lanes<kLanes>;
  using Vector = typename V::Vector;
  constexpr int kStep = Row::template Step<kLanes>();
  constexpr int kVectors = Row::kVectors;
  Vector sums[kCount][kVectors] = {};
  int64_t i = 0;
  for (; i + kStep <= size; i += kStep) {
    Vector values[kVectors], weights[kVectors];
    for (int v = 0; v < kVectors; ++v) values[v] = V::Load(x + i + v * kLanes);
    for (int r = 0; r < kCount; ++r) {
      ahead[r].template Prefetch<kStep>(i);
      rows[r].template Load<kLanes>(i, weights);
      for (int v = 0; v < kVectors; ++v) sums[r][v] += values[v] * weights[v];
    }
  }
  for (int r = 0; r < kCount; ++r) {
    Vector sum = sums[r][0];
    for (int v = 1; v < kVectors; ++v) sum += sums[r][v];
    products[r] = V::Sum(sum);
  }
  for (; i < size; ++i) {
    for (int r = 0; r < kCount; ++r) products[r] += x[i] * rows[r].Value(i);
  }
}

// Add scale * row for kCount rows to y, in the columns [begin, end), with rows ahead as above. A column's sum is added
// row by row in the order given, however many rows are added at once.
template <int kLanes, int kCount, class Row>
TDA_INLINE void AddScaled(float* y, const Row* rows, const Row* ahead, int64_t begin, int64_t end,
                          const float* scales) {
  using V = Lanes<kLanes>;
  using Vector = typename V::Vector;
  constexpr int kStep = Row::template Step<kLanes>();
  constexpr int kVectors = Row::kVectors;
  int64_t i = begin;
  for (; i + kStep <= end; i += kStep) {
    Vector sums[kVectors], weights[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = V::Load(y + i + v * kLanes);
    for (int r = 0; r < kCount; ++r) {
      ahead[r].template Prefetch<kStep>(i);
      rows[r].template Load<kLanes>(i, weights);
      for (int v = 0; v < kVectors; ++v) sums[v] += scales[r] * weights[v];
    }
    for (int v = 0; v < kVectors; ++v) V::Store(y + i + v * kLanes, sums[v]);
  }
  for (; i < end; ++i) {
    for (int r = 0; r < kCount; ++r) y[i] += scales[r] * rows[r].Value(i);
  }
}

template <int kLanes>
TDA_INLINE void FloatFormat::AddRows(const RowList& list, int64_t begin, int64_t end, float* sums, Apart&) const {
  Row rows[kRowsAtOnce], ahead[kRowsAtOnce];
  int64_t i = 0;
  for (; i + kRowsAtOnce <= list.count; i += kRowsAtOnce) {
    for (int r = 0; r < kRowsAtOnce; ++r) {
      rows[r] = {At(list.At(i + r)).first + begin};
      ahead[r] = {At(list.Ahead(i + r)).first + begin};
    }
    AddScaled<kLanes, kRowsAtOnce>(sums, rows, ahead, 0, end - begin, list.values + i);
  }
  for (; i < list.count; ++i) {
    rows[0] = {At(list.At(i)).first + begin};
    AddScaled<kLanes, 1>(sums, rows, rows, 0, end - begin, list.values + i);
  }
}

}  // namespace tda
