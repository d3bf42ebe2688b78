// Sums over rows for many tokens: a product of matrices, in which rows become floats once for a tile of tokens.
//
// A panel of columns is unpacked, and multiplied with blocks of tokens whose sums stay in registers. Every
// sum goes through the chunks of row_sums_cpu.h, and through the same operations in the same order as there, so that a
// token's result has the same bits whatever the other tokens are. A row that only some tokens of a tile need is
// multiplied by 0 for the others.
#pragma once

#include <algorithm>

#include "row_sums_cpu.h"

namespace tda {

constexpr int64_t kTokenTile = 512;
constexpr int64_t kTokensAtOnce = 32;  // whose values are prepared together
constexpr int64_t kPanelRows = 256;
constexpr int64_t kScaledAhead = 8;  // rows: what is stored is loaded again once it has arrived

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
  // The factor of each row for a token, in the order of use: segments of rows, blocks of tokens, rows, tokens.
  float* values;
  int64_t count;
  int64_t chunks;

  // Return where the segment ends that begins with the list's row `first`: with its chunk, or with a panel.
  TDA_INLINE int64_t SegmentEnd(int64_t first, int64_t chunk) const {
    const int64_t next = (chunk + 1) * inputs / chunks;
    return std::lower_bound(rows + first, rows + std::min(first + kPanelRows, count), next) - rows;
  }
};

// List the rows that the tile needs. Dense calls have seen all of them after a token or two.
TDA_INLINE void ListTileRows(TokenTile& tile) {
  std::fill_n(tile.needed, tile.inputs, 0);
  int64_t needed = 0;
  for (int64_t t = 0; t < tile.tokens && needed < tile.inputs; ++t) {
    const float* x = tile.x + t * tile.inputs;
    for (int64_t i = 0; i < tile.inputs; ++i) tile.needed[i] |= tile.prices.Kept(x[i], i) != 0.0f;
    needed = std::count(tile.needed, tile.needed + tile.inputs, 1);
  }
  tile.count = 0;
  for (int64_t i = 0; i < tile.inputs; ++i) {
    tile.rows[tile.count] = static_cast<int32_t>(i);
    tile.count += tile.needed[i];
  }
}

// Prepare the values of a block of tokens.
template <int kTokens>
TDA_INLINE void PrepareBlock(const TokenTile& tile, int64_t begin) {
  const float* x[kTokens];
  for (int t = 0; t < kTokens; ++t) x[t] = tile.x + std::min(begin + t, tile.tokens - 1) * tile.inputs;
  float* segment = tile.values;
  int64_t chunk = 0;
  for (int64_t first = 0; first < tile.count;) {
    const int64_t end = tile.SegmentEnd(first, chunk);
    if (end == first) ++chunk;
    float* own = segment + begin * (end - first);
    for (int64_t k = first; k < end; ++k, own += kTokens) {
      const int64_t row = tile.rows[k];
      float values[kTokens];
      for (int t = 0; t < kTokens; ++t) values[t] = x[t][row];
      for (int t = 0; t < kTokens; ++t) own[t] = tile.prices.Kept(values[t], row);
    }
    segment += (end - first) * tile.Padded();
    first = end;
  }
}

template <int kLanes>
TDA_INLINE void PrepareValuesOf(const TokenTile& tile, int64_t begin) {
  constexpr int kTokens = PanelShape<kLanes>::kTokens;
  const int64_t end = std::min(begin + kTokensAtOnce, tile.Padded());
  for (; begin < end; begin += kTokens) PrepareBlock<kTokens>(tile, begin);
}

// Rows of a panel as floats, [count, kColumns], and for codes the scale and the zero point of each.
template <int kLanes>
struct Panel {
  alignas(64) float floats[kPanelRows][PanelShape<kLanes>::kColumns];
  float scales[kPanelRows], zeros[kPanelRows];
};

// Add the products of a block of tokens with `count` rows of a panel to sums [kTokens, kColumns], and those with the zero
// points to zero_sums [kTokens].
template <int kLanes, bool kScaled>
TDA_INLINE void AddPanel(const float* values, const Panel<kLanes>& panel, int64_t count, float* sums,
                         float* zero_sums) {
  constexpr int kTokens = PanelShape<kLanes>::kTokens;
  using V = Lanes<kLanes>;
  using OfTokens = Lanes<kTokens>;
  typename V::Vector totals[kTokens][2];
  for (int t = 0; t < kTokens; ++t) {
    for (int v = 0; v < 2; ++v) totals[t][v] = V::Load(sums + (2 * t + v) * kLanes);
  }
  typename OfTokens::Vector zero_total = OfTokens::Load(zero_sums);
  alignas(64) float scaled[kScaled ? kPanelRows * kTokens : 1];
  const auto scale = [&](int64_t k) __attribute__((always_inline)) {
    const typename OfTokens::Vector own = OfTokens::Load(values + k * kTokens) * panel.scales[k];
    OfTokens::Store(scaled + k * kTokens, own);
    zero_total += own * panel.zeros[k];
  };
  if constexpr (kScaled) {
    for (int64_t k = 0; k < std::min(kScaledAhead, count); ++k) scale(k);
  }
  for (int64_t k = 0; k < count; ++k) {
    if constexpr (kScaled) {
      if (k + kScaledAhead < count) scale(k + kScaledAhead);
    }
    const float* factors = (kScaled ? scaled : values) + k * kTokens;
    const typename V::Vector low = V::Load(panel.floats[k]), high = V::Load(panel.floats[k] + kLanes);
    for (int t = 0; t < kTokens; ++t) {
      totals[t][0] += factors[t] * low;
      totals[t][1] += factors[t] * high;
    }
  }
  OfTokens::Store(zero_sums, zero_total);
  for (int t = 0; t < kTokens; ++t) {
    for (int v = 0; v < 2; ++v) V::Store(sums + (2 * t + v) * kLanes, totals[t][v]);
  }
}

template <int kLanes, class Format>
TDA_INLINE void UnpackPanel(const Format& weight, const int32_t* rows, int64_t count, int64_t column,
                            Panel<kLanes>& panel) {
  for (int64_t k = 0; k < count; ++k) {
    weight.template Unpack<kLanes>(rows[k], column, panel.floats[k]);
    if constexpr (Format::kScaled) {
      panel.scales[k] = weight.Scale(rows[k], column);
      panel.zeros[k] = weight.Zero(rows[k], column);
    }
  }
}

// Write a chunk's sums for a block of tokens into the columns [column, ..) of y [tokens, outputs].
template <int kLanes>
TDA_INLINE void WritePart(const float* sums, const float* zero_sums, int64_t tokens, bool first, const float* bias,
                          int64_t columns, int64_t outputs, float* y) {
  constexpr int kColumns = PanelShape<kLanes>::kColumns;
  for (int64_t t = 0; t < tokens; ++t, y += outputs, sums += kColumns) {
    const float zero_sum = zero_sums[t];
    if (first) {
      for (int64_t i = 0; i < columns; ++i) y[i] = sums[i] - zero_sum;
    } else {
      for (int64_t i = 0; i < columns; ++i) y[i] += sums[i] - zero_sum;
    }
    if (bias != nullptr) {
      for (int64_t i = 0; i < columns; ++i) y[i] += bias[i];
    }
  }
}

// Compute y [tokens, outputs] of a tile in the panel of columns that begins with `begin`, which has kColumns columns or
// those that are left.
template <int kLanes, class Format>
TDA_INLINE void MultiplyPanelOf(const Format& weight, const TokenTile& tile, int64_t begin, const float* bias,
                                float* y) {
  constexpr int kTokens = PanelShape<kLanes>::kTokens, kColumns = PanelShape<kLanes>::kColumns;
  Panel<kLanes> panel;
  alignas(64) float sums[kTokenTile / kTokens][kTokens * kColumns];
  alignas(64) float zero_sums[kTokenTile / kTokens][kTokens];
  const int64_t blocks = tile.Padded() / kTokens, columns = std::min<int64_t>(kColumns, weight.columns - begin);
  const float* values = tile.values;
  int64_t first = 0;
  for (int64_t chunk = 0; chunk < tile.chunks; ++chunk) {
    std::fill_n(sums[0], blocks * kTokens * kColumns, 0.0f);
    std::fill_n(zero_sums[0], blocks * kTokens, 0.0f);
    for (int64_t end; (end = tile.SegmentEnd(first, chunk)) > first; first = end) {
      UnpackPanel<kLanes>(weight, tile.rows + first, end - first, begin, panel);
      for (int64_t b = 0; b < blocks; ++b, values += (end - first) * kTokens) {
        AddPanel<kLanes, Format::kScaled>(values, panel, end - first, sums[b], zero_sums[b]);
      }
    }
    const float* last_bias = chunk + 1 == tile.chunks && bias != nullptr ? bias + begin : nullptr;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t tokens = std::min<int64_t>(kTokens, tile.tokens - b * kTokens);
      WritePart<kLanes>(sums[b], zero_sums[b], tokens, chunk == 0, last_bias, columns, weight.columns,
                        y + b * kTokens * weight.columns + begin);
    }
  }
}

}  // namespace tda
