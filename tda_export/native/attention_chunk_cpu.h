// Attention of some queries, float32, to a chunk of the keys and values of tokens and heads that share them; and the
// joined result of the chunks. Rows says how keys and values are stored (attention_rows_cpu.h).
//
// A chunk gives each query the largest score, the sum of exp(score - largest), and the values' sum weighted with these.
// Every sum uses the same operations in the same order for every call, and chunks begin at multiples of their length.
// So neither the number of threads nor the other tokens change a bit of a token's result.
#pragma once

#include <algorithm>

#include "attention_rows_cpu.h"
#include "exponential.h"

namespace tda {

constexpr int64_t kMostChunkRows = 256;

// Rows of keys, or of values, in a chunk: as many bytes as threads take at a time.
constexpr int64_t ChunkRows(int64_t head_size) {
  constexpr int64_t kElements = 16 << 10, kFewest = 64;
  return std::clamp(kElements / head_size / kFewest * kFewest, kFewest, kMostChunkRows);
}

// A query's result for one chunk.
struct ChunkResult {
  static int64_t Floats(int64_t head_size) { return 2 + head_size; }
  static ChunkResult At(float* memory) { return {memory, memory + 1, memory + 2}; }

  float* largest;
  float* sum;
  float* values;  // [size]
};

// Queries, and the rows of keys and values that all of them attend to.
template <class Rows>
struct QueriesOfChunk {
  Rows keys, values;
  int64_t rows, size;
  float softcap;  // 0 is none
  int64_t count;
  const float* const* queries;  // [count], each [size], times the scale
  float* const* results;        // [count], each ChunkResult::Floats(size)
};

// How many queries keep their sums in registers, with vectors of kLanes.
template <int kLanes>
constexpr int kQueriesAtOnce = kLanes > 8 ? 4 : 2;

constexpr int kKeysAtOnce = 4;
constexpr int kValueVectors = 4;
constexpr int64_t kAheadBytes = 6144;  // of what is read are asked for early
template <class Rows>
constexpr int64_t kElementsAhead = kAheadBytes / sizeof(typename Rows::Element);

// Compute queries . keys for some queries and rows, without the rows' scales, asking for the rows `ahead` meanwhile; the
// scores of queries are `stride` apart.
template <class Rows, int kLanes, int kQueries, int kRows>
TDA_INLINE void ScoreRows(const float* const* queries, const typename Rows::Element* keys,
                          const typename Rows::Element* ahead, int64_t size, float* scores, int64_t stride) {
  using V = Lanes<kLanes>;
  typename V::Vector sums[kQueries][kRows] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    typename V::Vector of_rows[kRows];
    for (int r = 0; r < kRows; ++r) {
      of_rows[r] = Rows::template Load<kLanes>(keys + r * size + i);
      __builtin_prefetch(ahead + r * size + i);
    }
    for (int q = 0; q < kQueries; ++q) {
      const typename V::Vector query = V::Load(queries[q] + i);
      for (int r = 0; r < kRows; ++r) sums[q][r] += query * of_rows[r];
    }
  }
  for (int q = 0; q < kQueries; ++q) {
    if constexpr (kRows == 4) {
      V::SumsOfFour(sums[q], scores + q * stride);
    } else {
      for (int r = 0; r < kRows; ++r) scores[q * stride + r] = V::Sum(sums[q][r]);
    }
  }
  for (; i < size; ++i) {
    for (int q = 0; q < kQueries; ++q) {
      for (int r = 0; r < kRows; ++r) scores[q * stride + r] += queries[q][i] * Rows::Value(keys[r * size + i]);
    }
  }
}

// Add weights . values for some queries, in kVectors vectors of columns.
template <class Rows, int kLanes, int kQueries, int kVectors>
TDA_INLINE void WeighColumns(const QueriesOfChunk<Rows>& chunk, const float* weights, int64_t stride, int64_t column,
                             float* const* results) {
  using V = Lanes<kLanes>;
  typename V::Vector sums[kQueries][kVectors] = {};
  for (int64_t row = 0; row < chunk.rows; ++row) {
    const typename Rows::Element* values = chunk.values.elements + row * chunk.size + column;
    typename V::Vector of_row[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      of_row[v] = Rows::template Load<kLanes>(values + v * kLanes);
      __builtin_prefetch(values + kElementsAhead<Rows> + v * kLanes);
    }
    for (int q = 0; q < kQueries; ++q) {
      for (int v = 0; v < kVectors; ++v) sums[q][v] += weights[q * stride + row] * of_row[v];
    }
  }
  for (int q = 0; q < kQueries; ++q) {
    float* out = ChunkResult::At(results[q]).values + column;
    for (int v = 0; v < kVectors; ++v) V::Store(out + v * kLanes, sums[q][v]);
  }
}

template <class Rows>
TDA_INLINE void MultiplyByScales(const Rows& of, int64_t rows, float* numbers) {
  if constexpr (Rows::kScaled) {
    for (int64_t i = 0; i < rows; ++i) numbers[i] *= of.scales[i];
  }
}

template <class Rows, int kLanes, int kQueries>
TDA_INLINE void AttendQueries(const QueriesOfChunk<Rows>& chunk, int64_t first) {
  using V = Lanes<kLanes>;
  constexpr int64_t kStride = kMostChunkRows + kLanes;
  const int64_t rows = chunk.rows;
  const typename Rows::Element* const keys = chunk.keys.elements;
  const float* const* queries = chunk.queries + first;
  float* const* results = chunk.results + first;
  alignas(64) float scores[kQueries * kStride];
  const int64_t rows_ahead = kElementsAhead<Rows> / chunk.size;
  int64_t row = 0;
  for (; row + kKeysAtOnce <= rows; row += kKeysAtOnce) {
    const int64_t behind = row + rows_ahead - rows;  // the last key, where the values are next
    const typename Rows::Element* ahead =
        behind < 0 ? keys + (row + rows_ahead) * chunk.size : chunk.values.elements + behind * chunk.size;
    ScoreRows<Rows, kLanes, kQueries, kKeysAtOnce>(queries, keys + row * chunk.size, ahead, chunk.size, scores + row,
                                                   kStride);
  }
  for (; row < rows; ++row) {
    const typename Rows::Element* key = keys + row * chunk.size;
    ScoreRows<Rows, kLanes, kQueries, 1>(queries, key, key, chunk.size, scores + row, kStride);
  }
  for (int q = 0; q < kQueries; ++q) {
    float* own = scores + q * kStride;
    MultiplyByScales(chunk.keys, rows, own);
    const auto pad = [&] { std::fill(own + rows, own + (rows + kLanes - 1) / kLanes * kLanes, -__builtin_inff()); };
    pad();
    if (chunk.softcap > 0.0f) {
      for (int64_t i = 0; i < rows; i += kLanes) {
        V::Store(own + i, chunk.softcap * Tanh<kLanes>(V::Load(own + i) / chunk.softcap));
      }
      pad();
    }
    typename V::Vector largest = typename V::Vector{} - __builtin_inff(), sum = {};
    for (int64_t i = 0; i < rows; i += kLanes) largest = V::Larger(largest, V::Load(own + i));
    const float most = V::Largest(largest);
    for (int64_t i = 0; i < rows; i += kLanes) {
      const typename V::Vector weights = Exp<kLanes>(V::Load(own + i) - most);
      V::Store(own + i, weights);
      sum += weights;
    }
    const ChunkResult result = ChunkResult::At(results[q]);
    *result.largest = most;
    *result.sum = V::Sum(sum);
    MultiplyByScales(chunk.values, rows, own);
  }
  int64_t column = 0;
  for (; column + kValueVectors * kLanes <= chunk.size; column += kValueVectors * kLanes) {
    WeighColumns<Rows, kLanes, kQueries, kValueVectors>(chunk, scores, kStride, column, results);
  }
  for (; column + kLanes <= chunk.size; column += kLanes) {
    WeighColumns<Rows, kLanes, kQueries, 1>(chunk, scores, kStride, column, results);
  }
  for (; column < chunk.size; ++column) {
    for (int q = 0; q < kQueries; ++q) {
      float of_column = 0.0f;
      for (int64_t r = 0; r < rows; ++r) {
        of_column += scores[q * kStride + r] * Rows::Value(chunk.values.elements[r * chunk.size + column]);
      }
      ChunkResult::At(results[q]).values[column] = of_column;
    }
  }
}

// Compute the results of all queries, for at least one row and no more than kMostChunkRows.
template <int kLanes, class Rows>
TDA_INLINE void AttendChunkOf(const QueriesOfChunk<Rows>& chunk) {
  constexpr int kMost = kQueriesAtOnce<kLanes>;
  int64_t first = 0;
  for (; first + kMost <= chunk.count; first += kMost) AttendQueries<Rows, kLanes, kMost>(chunk, first);
  const int64_t rest = chunk.count - first;
  if (rest == 1) AttendQueries<Rows, kLanes, 1>(chunk, first);
  if constexpr (kMost > 2) {
    if (rest == 2) AttendQueries<Rows, kLanes, 2>(chunk, first);
    if (rest == 3) AttendQueries<Rows, kLanes, 3>(chunk, first);
  }
}

// Write a query's result, [size], from the results of its chunks, which are `stride` floats apart.
template <int kLanes>
TDA_INLINE void JoinChunksOf(float* results, int64_t chunks, int64_t stride, int64_t size, float* out) {
  float most = -__builtin_inff(), sum = 0.0f;
  for (int64_t c = 0; c < chunks; ++c) {
    const float largest = *ChunkResult::At(results + c * stride).largest;
    most = largest > most ? largest : most;
  }
  for (int64_t c = 0; c < chunks; ++c) {
    const ChunkResult chunk = ChunkResult::At(results + c * stride);
    const float weight = Exp<kLanes>(typename Lanes<kLanes>::Vector{} + (*chunk.largest - most))[0];
    sum += *chunk.sum * weight;
    *chunk.largest = weight;
  }
  std::fill_n(out, size, 0.0f);
  for (int64_t c = 0; c < chunks; ++c) {
    const ChunkResult chunk = ChunkResult::At(results + c * stride);
    for (int64_t i = 0; i < size; ++i) out[i] += chunk.values[i] * *chunk.largest;
  }
  for (int64_t i = 0; i < size; ++i) out[i] /= sum;
}

// Rotate a head [size] by a position's angles: elements j and j + pairs, or, where they interleave, 2 j and 2 j + 1.
// Elements after the pairs are not rotated. All are multiplied by `scale`.
struct Rotation {
  const float* cos;  // [pairs] of the position
  const float* sin;
  int64_t pairs;
  bool interleaved;
};

TDA_INLINE void RotateHead(const Rotation& rotation, const float* x, int64_t size, float scale, float* y) {
  const int64_t pairs = rotation.pairs;
  if (rotation.interleaved) {
    for (int64_t j = 0; j < pairs; ++j) {
      const float a = x[2 * j], b = x[2 * j + 1];
      y[2 * j] = (a * rotation.cos[j] - b * rotation.sin[j]) * scale;
      y[2 * j + 1] = (b * rotation.cos[j] + a * rotation.sin[j]) * scale;
    }
  } else {
    for (int64_t j = 0; j < pairs; ++j) {
      const float a = x[j], b = x[j + pairs];
      y[j] = (a * rotation.cos[j] - b * rotation.sin[j]) * scale;
      y[j + pairs] = (b * rotation.cos[j] + a * rotation.sin[j]) * scale;
    }
  }
  for (int64_t i = 2 * pairs; i < size; ++i) y[i] = x[i] * scale;
}

}  // namespace tda
