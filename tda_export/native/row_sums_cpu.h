// Sums over the rows that tokens need, read in place.
//
// Rows are cut into chunks, and a chunk's rows are added one after another in order; the sums of the chunks are added in
// order as well. The places of chunks depend only on the shape of the matrix, so that neither the number of threads nor
// the other tokens of a call change a bit of a token's result. Where products of bytes are used (digits_cpu.h), this
// holds for calls of up to kTokensByDigits tokens. Tiles of columns change no bit wherever they are, so that there are
// as many as the threads need.
#pragma once

#include <algorithm>
#include <cstring>
#include <numeric>

#include "codes_cpu.h"
#include "digit_sums_cpu.h"
#include "row_list.h"
#include "rows_cpu.h"

namespace tda {

// Where rows are too short to be cut well, two chunks at least, if that costs little beside the work. More only where they
// stay long.
constexpr int64_t kWideRow = 1024;    // columns, of which pieces are still long
constexpr int64_t kMostChunks = 16;
constexpr int64_t kEnoughTasks = 32;  // chunks of all tiles of columns; more would only store more sums
constexpr int64_t kShortChunk = 32 << 10, kLongChunk = 256 << 10, kLongWideChunk = 512 << 10;  // bytes of weights
constexpr int64_t kShortTask = 16 << 10;  // bytes of weights; fewer are not worth a task
constexpr int64_t kListed = 512;           // rows at once
constexpr int64_t kAheadBytes = 6 << 10;   // of what a thread reads are asked for early
constexpr int kTokensTogether = 8;         // that share codes, at most

constexpr int64_t WholeBlocks(int64_t columns) { return (columns + kMostBlock - 1) / kMostBlock * kMostBlock; }

// A matrix [inputs, outputs] cut into chunks of rows and tiles of columns.
template <class Format>
struct RowChunks {
  RowChunks(const Format& weight, int64_t inputs, int64_t threads) : inputs(inputs), outputs(weight.columns) {
    const int64_t bytes = inputs * weight.RowBytes();
    const int64_t fewest_tiles = (outputs + Format::kTileColumns - 1) / Format::kTileColumns;
    const auto least_bytes = [&] {  // of a chunk, if there are twice as many
      if (outputs >= kWideRow) return kLongWideChunk;
      return count == 1 ? kShortChunk : kLongChunk;
    };
    while (count < kMostChunks && count * fewest_tiles < kEnoughTasks && 2 * count <= inputs &&
           2 * count * least_bytes() <= bytes) {
      count *= 2;
    }
    // With the chunks, a multiple of the threads, if there are not enough tasks for an uneven number to cost little.
    tiles = threads / std::gcd(threads, count);
    tiles *= (fewest_tiles + tiles - 1) / tiles;
    if (count * fewest_tiles >= 4 * threads) tiles = fewest_tiles;
    tiles = std::clamp(bytes / (count * kShortTask), fewest_tiles, tiles);
    const int64_t unit = weight.TileUnit(), units = (outputs + unit - 1) / unit;
    tile_columns = (units + tiles - 1) / tiles * unit;
    tiles = (outputs + tile_columns - 1) / tile_columns;
  }

  int64_t FirstRow(int64_t chunk) const { return chunk * inputs / count; }
  int64_t FirstColumn(int64_t tile) const { return std::min(tile * tile_columns, outputs); }

  int64_t inputs, outputs;
  int64_t count = 1;  // chunks
  int64_t tiles, tile_columns;
};

// A few tokens' work on a chunk of rows, in a tile of columns.
struct ChunkOfTokens {
  const float* x;  // [tokens, inputs]
  int64_t tokens, inputs;
  RowPrices prices;
  int64_t first_row, end_row;
  int64_t begin, end;  // columns
  float* sums;         // of each token, token_stride apart: whole blocks of columns, in the Format's own order
  int64_t token_stride;

  const float* X(int64_t token) const { return x + token * inputs; }
  float* Sums(int64_t token) const { return sums + token * token_stride; }
};

// Return whether sums are computed by products of bytes.
template <int kLanes, class Format>
TDA_INLINE bool MultipliesBytesOf() {
  if constexpr (Format::kScaled) {
    if constexpr (kByteProducts<kLanes, Format::kCodeBits>) return HasByteProducts<kLanes>();
  }
  return false;
}

// Compute the sums of kTokens tokens from `token` on by products of bytes. Returns those where these cannot be used, as
// bits from the token on; their sums are undefined.
template <int kLanes, int kTokens, int kBits>
TDA_INLINE unsigned SumDigits(const CodeFormat<kBits>& weight, const ChunkOfTokens& chunk, int64_t token) {
  using Sums = DigitSums<kLanes, kBits, kTokens>;
  int32_t rows[kListed + kQuad];
  float of_tokens[kTokens][kListed + kQuad];
  float* values[kTokens];
  for (int t = 0; t < kTokens; ++t) {
    values[t] = of_tokens[t];
    std::fill_n(chunk.Sums(token + t), WholeBlocks(chunk.end - chunk.begin), 0.0f);
  }
  unsigned failed = 0;
  for (int64_t first = chunk.first_row; first < chunk.end_row && failed + 1 < 1u << kTokens; first += kListed) {
    const int64_t end = std::min(first + kListed, chunk.end_row);
    const int64_t count = ListRows<kLanes>(chunk.X(token), chunk.inputs, chunk.prices, first, end, rows, values);
    for (int64_t begin = chunk.begin; begin < chunk.end; begin += Sums::kMostColumns) {
      float* sums[kTokens];
      for (int t = 0; t < kTokens; ++t) sums[t] = chunk.Sums(token + t) + begin - chunk.begin;
      Sums digit_sums(weight, begin, std::min(begin + Sums::kMostColumns, chunk.end));
      failed |= digit_sums.AddRows(rows, values, count, sums);
    }
  }
  return failed;
}

// Compute the sums of all tokens from `token` on, kTokens of them together, and what is left by halves of that.
template <int kLanes, int kTokens, int kBits>
TDA_INLINE uint64_t SumAllDigits(const CodeFormat<kBits>& weight, const ChunkOfTokens& chunk, int64_t token) {
  uint64_t failed = 0;
  for (; token + kTokens <= chunk.tokens; token += kTokens) {
    failed |= static_cast<uint64_t>(SumDigits<kLanes, kTokens>(weight, chunk, token)) << token;
  }
  if constexpr (kTokens > 1) failed |= SumAllDigits<kLanes, kTokens / 2>(weight, chunk, token);
  return failed;
}

// Compute the sums of one token by floats.
template <int kLanes, class Format>
TDA_INLINE void SumFloats(const Format& weight, const ChunkOfTokens& chunk, int64_t token) {
  int32_t rows[kListed];
  float values[kListed];
  float* const of_token[1] = {values};
  float* sums = chunk.Sums(token);
  const int64_t piece = weight.RowBytes() * (chunk.end - chunk.begin) / weight.columns + 1;
  const int64_t groups_ahead = 1 + kAheadBytes / (piece * Format::kRowsAtOnce);
  typename Format::Apart apart;
  std::fill_n(sums, WholeBlocks(chunk.end - chunk.begin), 0.0f);
  for (int64_t first = chunk.first_row; first < chunk.end_row; first += kListed) {
    const int64_t end = std::min(first + kListed, chunk.end_row);
    const int64_t count = ListRows<kLanes>(chunk.X(token), chunk.inputs, chunk.prices, first, end, rows, of_token);
    const RowList list = {rows, values, count, groups_ahead * Format::kRowsAtOnce};
    weight.template AddRows<kLanes>(list, chunk.begin, chunk.end, sums, apart);
  }
  weight.template Complete<kLanes>(chunk.begin, chunk.end, sums, apart);
}

// Compute the sums of a chunk.
template <int kLanes, class Format>
TDA_INLINE void SumChunkOf(const Format& weight, const ChunkOfTokens& chunk) {
  uint64_t left = (uint64_t{1} << chunk.tokens) - 1;  // tokens, as bits
  if constexpr (Format::kScaled) {
    if constexpr (kByteProducts<kLanes, Format::kCodeBits>) {
      if (weight.largest != nullptr) left = SumAllDigits<kLanes, kTokensTogether>(weight, chunk, 0);
    }
  }
  for (int64_t t = 0; t < chunk.tokens; ++t) {
    if (left >> t & 1) SumFloats<kLanes>(weight, chunk, t);
  }
}

// Write the sum of all chunks, whose sums are `stride` floats apart, and of the bias, if there is one, to y [columns].
template <int kLanes, class Format>
TDA_INLINE void AddChunksOf(float* sums, int64_t chunks, int64_t stride, int64_t columns, const float* bias,
                            float* y) {
  float in_order[Format::kTileColumns];
  const int64_t whole = WholeBlocks(columns);
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    const float* own = sums + chunk * stride;
    for (int64_t i = 0; i < whole; ++i) sums[i] += own[i];
  }
  Format::template InOrder<kLanes>(sums, columns, in_order);
  for (int64_t i = 0; i < columns; ++i) y[i] = bias == nullptr ? in_order[i] : in_order[i] + bias[i];
}

}  // namespace tda
