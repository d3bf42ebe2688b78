// Attention of one token to a chunk of the keys and values, float32, for the heads that share them; and what the chunks
// together give.
//
// A chunk gives each head the largest score, the sum of exp(score - largest), and the values' sum weighted with these.
// Every sum goes through the same operations in the same order whatever else a call holds, and chunks begin at multiples
// of their length, so that neither threads nor the other tokens change a bit of a token's result.
#pragma once

#include <algorithm>

#include "exponential.h"

namespace tda {

constexpr int64_t kMostChunkRows = 256;

// Rows of keys, or of values, in a chunk: as many bytes as threads take at a time.
constexpr int64_t ChunkRows(int64_t head_size) {
  constexpr int64_t kElements = 16 << 10, kFewest = 64;
  return std::clamp(kElements / head_size / kFewest * kFewest, kFewest, kMostChunkRows);
}

// What a head has of a chunk.
struct ChunkResult {
  static int64_t Floats(int64_t head_size) { return 2 + head_size; }
  static ChunkResult At(float* memory) { return {memory, memory + 1, memory + 2}; }

  float* largest;
  float* sum;
  float* values;  // [size]
};

// Heads of a token, and the rows of keys and values that it attends to.
struct HeadsOfToken {
  const float* queries;  // [heads, size], times the scale
  const float* keys;     // [rows, size]
  const float* values;   // [rows, size]
  int64_t heads, rows, size;
  float softcap;  // 0 is none
  float* results;  // [heads, ChunkResult::Floats(size)]
};

// How many heads have their sums in registers, with vectors of kLanes.
template <int kLanes>
constexpr int kHeadsAtOnce = kLanes > 8 ? 4 : 2;

constexpr int kKeysAtOnce = 4;
constexpr int kValueVectors = 4;
constexpr int64_t kAheadFloats = 1536;  // of what is read are asked for early

// Compute queries . keys for some heads and rows, asking for the rows `ahead` meanwhile; the scores of a head are `stride`
// apart.
template <int kLanes, int kHeads, int kRows>
TDA_INLINE void ScoreRows(const float* queries, const float* keys, const float* ahead, int64_t size, float* scores,
                          int64_t stride) {
  using V = Lanes<kLanes>;
  typename V::Vector sums[kHeads][kRows] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    typename V::Vector of_rows[kRows];
    for (int r = 0; r < kRows; ++r) {
      of_rows[r] = V::Load(keys + r * size + i);
      __builtin_prefetch(ahead + r * size + i);
    }
    for (int h = 0; h < kHeads; ++h) {
      const typename V::Vector query = V::Load(queries + h * size + i);
      for (int r = 0; r < kRows; ++r) sums[h][r] += query * of_rows[r];
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    if constexpr (kRows == 4) {
      V::SumsOfFour(sums[h], scores + h * stride);
    } else {
      for (int r = 0; r < kRows; ++r) scores[h * stride + r] = V::Sum(sums[h][r]);
    }
  }
  for (; i < size; ++i) {
    for (int h = 0; h < kHeads; ++h) {
      for (int r = 0; r < kRows; ++r) scores[h * stride + r] += queries[h * size + i] * keys[r * size + i];
    }
  }
}

// Add weights . values for some heads, in kVectors vectors of columns.
template <int kLanes, int kHeads, int kVectors>
TDA_INLINE void WeighColumns(const HeadsOfToken& token, const float* weights, int64_t stride, int64_t column,
                             float* results) {
  using V = Lanes<kLanes>;
  typename V::Vector sums[kHeads][kVectors] = {};
  for (int64_t row = 0; row < token.rows; ++row) {
    const float* values = token.values + row * token.size + column;
    typename V::Vector of_row[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      of_row[v] = V::Load(values + v * kLanes);
      __builtin_prefetch(values + kAheadFloats + v * kLanes);
    }
    for (int h = 0; h < kHeads; ++h) {
      for (int v = 0; v < kVectors; ++v) sums[h][v] += weights[h * stride + row] * of_row[v];
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    float* out = ChunkResult::At(results + h * ChunkResult::Floats(token.size)).values + column;
    for (int v = 0; v < kVectors; ++v) V::Store(out + v * kLanes, sums[h][v]);
  }
}

template <int kLanes, int kHeads>
TDA_INLINE void AttendHeads(const HeadsOfToken& token, int64_t first) {
  using V = Lanes<kLanes>;
  constexpr int64_t kStride = kMostChunkRows + kLanes;
  const int64_t floats = ChunkResult::Floats(token.size), rows = token.rows;
  const float* queries = token.queries + first * token.size;
  float* results = token.results + first * floats;
  alignas(64) float scores[kHeads * kStride];
  const int64_t rows_ahead = kAheadFloats / token.size;
  int64_t row = 0;
  for (; row + kKeysAtOnce <= rows; row += kKeysAtOnce) {
    const int64_t behind = row + rows_ahead - rows;  // the last key, where the values are next
    const float* ahead = behind < 0 ? token.keys + (row + rows_ahead) * token.size : token.values + behind * token.size;
    ScoreRows<kLanes, kHeads, kKeysAtOnce>(queries, token.keys + row * token.size, ahead, token.size, scores + row,
                                           kStride);
  }
  for (; row < rows; ++row) {
    const float* keys = token.keys + row * token.size;
    ScoreRows<kLanes, kHeads, 1>(queries, keys, keys, token.size, scores + row, kStride);
  }
  for (int h = 0; h < kHeads; ++h) {
    float* own = scores + h * kStride;
    const auto pad = [&] { std::fill(own + rows, own + (rows + kLanes - 1) / kLanes * kLanes, -__builtin_inff()); };
    pad();
    if (token.softcap > 0.0f) {
      for (int64_t i = 0; i < rows; i += kLanes) {
        V::Store(own + i, token.softcap * Tanh<kLanes>(V::Load(own + i) / token.softcap));
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
    const ChunkResult result = ChunkResult::At(results + h * floats);
    *result.largest = most;
    *result.sum = V::Sum(sum);
  }
  int64_t column = 0;
  for (; column + kValueVectors * kLanes <= token.size; column += kValueVectors * kLanes) {
    WeighColumns<kLanes, kHeads, kValueVectors>(token, scores, kStride, column, results);
  }
  for (; column + kLanes <= token.size; column += kLanes) {
    WeighColumns<kLanes, kHeads, 1>(token, scores, kStride, column, results);
  }
  for (; column < token.size; ++column) {
    for (int h = 0; h < kHeads; ++h) {
      float of_column = 0.0f;
      for (int64_t r = 0; r < rows; ++r) of_column += scores[h * kStride + r] * token.values[r * token.size + column];
      ChunkResult::At(results + h * floats).values[column] = of_column;
    }
  }
}

// Compute the results of all heads, for at least one row and no more than kMostChunkRows.
template <int kLanes>
TDA_INLINE void AttendChunkOf(const HeadsOfToken& token) {
  constexpr int kMost = kHeadsAtOnce<kLanes>;
  int64_t first = 0;
  for (; first + kMost <= token.heads; first += kMost) AttendHeads<kLanes, kMost>(token, first);
  const int64_t rest = token.heads - first;
  if (rest == 1) AttendHeads<kLanes, 1>(token, first);
  if constexpr (kMost > 2) {
    if (rest == 2) AttendHeads<kLanes, 2>(token, first);
    if (rest == 3) AttendHeads<kLanes, 3>(token, first);
  }
}

// Write what a head attends to, [size], from the results of its chunks, which are `stride` floats apart.
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
// What lies behind the pairs stays. All is multiplied by `scale`.
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
