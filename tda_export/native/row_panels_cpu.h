// Sums over rows for many tokens: a product of matrices, in which rows become floats once for a tile of tokens.
//
// A strip of columns is unpacked panel by panel, and multiplied with blocks of tokens whose sums stay in registers. Every
// sum goes through the chunks of row_sums_cpu.h, and through the same operations in the same order as there, so that a
// token's result has the same bits alone and in a crowd. A row that some token of a tile needs is multiplied with 0 for
// those that do not.
#pragma once

#include <algorithm>

#include "row_sums_cpu.h"

namespace tda {

constexpr int64_t kTokenTile = 128;
constexpr int64_t kPanelRows = 256;
constexpr int kPanels = 2;  // of a strip
constexpr int64_t kMostStrip = kPanels * 2 * 16;

// How many tokens and columns have their sums in registers.
template <int kLanes>
struct PanelShape {
  static constexpr int kTokens = kLanes > 8 ? 8 : 4;
  static constexpr int kColumns = 2 * kLanes;
};

// A tile of tokens, and the rows that they need.
struct TokenTile {
  int64_t Padded() const { return (tokens + 7) / 8 * 8; }

  const float* x;  // [tokens, inputs]
  int64_t tokens, inputs;
  RowPrices prices;
  uint8_t* needed;  // [inputs]
  int32_t* rows;    // [inputs], of which `count` are used
  float* values;    // [blocks of tokens, count, tokens of a block]: what a token multiplies each row with
  int64_t count;
};

// List the rows that the tile needs, and what they are multiplied with.
template <int kLanes>
TDA_INLINE void PrepareTileOf(TokenTile& tile) {
  constexpr int kTokens = PanelShape<kLanes>::kTokens;
  std::fill_n(tile.needed, tile.inputs, 0);
  for (int64_t t = 0; t < tile.tokens; ++t) {
    const float* x = tile.x + t * tile.inputs;
    for (int64_t i = 0; i < tile.inputs; ++i) tile.needed[i] |= tile.prices.Kept(x[i], i) != 0.0f;
  }
  tile.count = 0;
  for (int64_t i = 0; i < tile.inputs; ++i) {
    tile.rows[tile.count] = static_cast<int32_t>(i);
    tile.count += tile.needed[i];
  }
  for (int64_t t = 0; t < tile.Padded(); ++t) {
    float* values = tile.values + t / kTokens * kTokens * tile.count + t % kTokens;
    const float* x = tile.x + t * tile.inputs;
    for (int64_t k = 0; k < tile.count; ++k) {
      values[k * kTokens] = t < tile.tokens ? tile.prices.Kept(x[tile.rows[k]], tile.rows[k]) : 0.0f;
    }
  }
}

// Add the products of kTokens tokens with `count` rows of a panel to sums [kTokens, kColumns].
template <int kLanes>
TDA_INLINE void AddPanel(const float* values, const float* panel, int64_t count, float* sums) {
  using V = Lanes<kLanes>;
  constexpr int kTokens = PanelShape<kLanes>::kTokens;
  typename V::Vector totals[kTokens][2];
  for (int t = 0; t < kTokens; ++t) {
    for (int v = 0; v < 2; ++v) totals[t][v] = V::Load(sums + (2 * t + v) * kLanes);
  }
  for (int64_t k = 0; k < count; ++k) {
    const typename V::Vector low = V::Load(panel + 2 * kLanes * k), high = V::Load(panel + 2 * kLanes * k + kLanes);
    for (int t = 0; t < kTokens; ++t) {
      totals[t][0] += values[k * kTokens + t] * low;
      totals[t][1] += values[k * kTokens + t] * high;
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int v = 0; v < 2; ++v) V::Store(sums + (2 * t + v) * kLanes, totals[t][v]);
  }
}

// Up to kPanelRows rows of a strip as floats, and what a Format has for each row of a panel.
template <int kLanes, class Format>
struct Strip {
  static constexpr int kTokens = PanelShape<kLanes>::kTokens;
  static constexpr int kColumns = PanelShape<kLanes>::kColumns;

  TDA_INLINE void Unpack(const Format& weight, const int32_t* rows, int64_t row_count, int64_t begin) {
    count = row_count;
    for (int64_t k = 0; k < count; ++k) {
      for (int p = 0; p < kPanels && begin + p * kColumns < weight.columns; ++p) {
        const int64_t column = begin + p * kColumns;
        weight.template Unpack<kLanes>(rows[k], column, floats[p][k]);
        if constexpr (Format::kScaled) {
          scales[p][k] = weight.Scale(rows[k], column);
          zeros[p][k] = weight.Zero(rows[k], column);
        }
      }
    }
  }

  // Add the products with a block of tokens to sums [kTokens, kColumns] and zero_sums [kTokens].
  TDA_INLINE void Add(int panel, const float* values, float* sums, float* zero_sums) const {
    if constexpr (!Format::kScaled) {
      AddPanel<kLanes>(values, floats[panel][0], count, sums);
    } else {
      using Some = Lanes<kTokens>;
      alignas(64) float scaled[kPanelRows * kTokens];
      typename Some::Vector zero_sum = Some::Load(zero_sums);
      for (int64_t k = 0; k < count; ++k) {
        const typename Some::Vector own = Some::Load(values + k * kTokens) * scales[panel][k];
        Some::Store(scaled + k * kTokens, own);
        zero_sum += own * zeros[panel][k];
      }
      Some::Store(zero_sums, zero_sum);
      AddPanel<kLanes>(scaled, floats[panel][0], count, sums);
    }
  }

  int64_t count;
  alignas(64) float floats[kPanels][kPanelRows][kColumns];
  float scales[kPanels][kPanelRows], zeros[kPanels][kPanelRows];
};

// Compute y [tokens, outputs] of a tile in the strip of columns that begins with `begin`, which has kStrip columns or
// those that are left.
template <int kLanes, class Format>
TDA_INLINE void MultiplyStripOf(const Format& weight, const TokenTile& tile, int64_t begin, const float* bias, float* y) {
  using OneStrip = Strip<kLanes, Format>;
  constexpr int kTokens = OneStrip::kTokens, kColumns = OneStrip::kColumns;
  const RowChunks<Format> chunks(weight, tile.inputs);
  OneStrip strip;
  alignas(64) float sums[kTokenTile / kTokens][kPanels][kTokens * kColumns];
  float zero_sums[kTokenTile / kTokens][kPanels][kTokens];
  const int64_t outputs = weight.columns, blocks = tile.Padded() / kTokens;
  int64_t first = 0;
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    const int64_t end = std::lower_bound(tile.rows + first, tile.rows + tile.count, chunks.FirstRow(chunk + 1)) - tile.rows;
    std::fill_n(sums[0][0], blocks * kPanels * kTokens * kColumns, 0.0f);
    std::fill_n(zero_sums[0][0], blocks * kPanels * kTokens, 0.0f);
    for (; first < end; first = std::min(first + kPanelRows, end)) {
      strip.Unpack(weight, tile.rows + first, std::min(kPanelRows, end - first), begin);
      for (int64_t b = 0; b < blocks; ++b) {
        const float* values = tile.values + (b * tile.count + first) * kTokens;
        for (int p = 0; p < kPanels && begin + p * kColumns < outputs; ++p) {
          strip.Add(p, values, sums[b][p], zero_sums[b][p]);
        }
      }
    }
    for (int64_t t = 0; t < tile.tokens; ++t) {
      for (int p = 0; p < kPanels; ++p) {
        const int64_t column = begin + p * kColumns;
        const float* own = sums[t / kTokens][p] + t % kTokens * kColumns;
        const float zero_sum = zero_sums[t / kTokens][p][t % kTokens];
        for (int64_t i = 0; i < std::min<int64_t>(kColumns, outputs - column); ++i) {
          float& total = y[t * outputs + column + i];
          const float part = Format::kScaled ? own[i] - zero_sum : own[i];
          total = chunk == 0 ? part : total + part;
          if (chunk + 1 == chunks.count && bias != nullptr) total += bias[column + i];
        }
      }
    }
  }
}

}  // namespace tda
