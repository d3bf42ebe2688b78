// Products of tokens with rows of codes: a row is an output, and its codes are read once for a few tokens.
//
//   y[j] = sum over groups of scale * (sum of x * code - zero * sum of x)
//
// x comes in the order of the codes (codes_cpu.h), with zeros past its end, and is summed by group once a call. A
// token's result has the same bits whatever the other tokens of the call are.
#pragma once

#include <algorithm>

#include "digits_cpu.h"

namespace tda {

constexpr int64_t kRowsAtATime = 32;    // for all tokens, so that they stay in a near cache
constexpr int64_t kDotAhead = 8 << 10;  // bytes of codes

// Activations [tokens, columns] as dots want them.
struct DotInputs {
  DotInputs(const CodeLayout& layout, int64_t tokens)
      : size(Rounded(layout.columns, kMostBlock)), groups(Rounded(layout.Groups(), 16)), tokens(tokens) {}

  static int64_t Rounded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }
  bool ByDigits() const { return tokens <= kTokensByDigits; }  // where the processor multiplies bytes
  int64_t Bytes() const {
    return tokens * ((size + groups + 1) * sizeof(float) + (ByDigits() ? kDigits * size : 0));
  }

  // Lay out the inputs in Bytes() of memory.
  void Place(float* memory) {
    values = memory;
    sums = values + tokens * size;
    steps = sums + tokens * groups;
    digits = reinterpret_cast<int8_t*>(steps + tokens);
  }

  int64_t size, groups, tokens;
  float* values;   // [tokens, size], in the order of the codes
  float* sums;     // [tokens, groups]
  float* steps;    // [tokens]; below zero where a token has no digits
  int8_t* digits;  // [tokens, kDigits * size]
};

// Prepare one token's x [columns].
template <int kLanes, int kBits>
TDA_INLINE void PrepareTokenOf(const CodeFormat<kBits>& weight, const float* x, int64_t token,
                               const DotInputs& inputs) {
  using Block = CodeBlock<kLanes, kBits>;
  float* values = inputs.values + token * inputs.size;
  float* sums = inputs.sums + token * inputs.groups;
  std::fill_n(sums, inputs.groups, 0.0f);
  for (int64_t i = 0; i < weight.columns; ++i) sums[i >> weight.group_shift] += x[i];
  for (int64_t at = 0; at < inputs.size; at += Block::kColumns) {
    for (int k = 0; k < Block::kPerLane; ++k) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t column = at + lane * Block::kPerLane + k;
        values[at + k * kLanes + lane] = column < weight.columns ? x[column] : 0.0f;
      }
    }
  }
}

// The scales of a row as floats, and those times the zero points; zeros past the last group.
template <int kLanes, int kBits>
struct RowScales {
  static constexpr int64_t kGroupsAtOnce = CodeFormat<kBits>::kTileGroups;

  TDA_INLINE void Read(const CodeFormat<kBits>& weight, int64_t row, int64_t first_group, int64_t count) {
    using V = Lanes<kLanes>;
    Piece<uint16_t, kLanes> scales_piece;
    Piece<uint8_t, kLanes> zeros_piece;
    for (int64_t g = 0; g < count; g += kLanes) {
      const int64_t rest = std::min<int64_t>(kLanes, count - g), at = first_group + g;
      typename V::Vector scale = V::LoadHalves(scales_piece.Of(weight.scales + row * weight.groups + at, rest, kLanes,
                                                               weight.scales + weight.rows * weight.groups));
      const uint8_t* zero_points = zeros_piece.Of(weight.zeros + row * weight.zero_bytes + weight.CodeBytes(at),
                                                  weight.CodeBytes(rest), weight.CodeBytes(kLanes),
                                                  weight.zeros + weight.rows * weight.zero_bytes);
      scale = V::Counting() < static_cast<uint32_t>(rest) ? scale : typename V::Vector{};
      V::Store(scales + g, scale);
      V::Store(zeros + g, scale * CodeBlock<kLanes, kBits>::InOrder(zero_points));
    }
    V::Store(scales + (count + kLanes - 1) / kLanes * kLanes, typename V::Vector{});
  }

  float scales[kGroupsAtOnce + kLanes], zeros[kGroupsAtOnce];
};

// Compute the products of a row with kTokens tokens from `token` on, into y[t * stride].
template <int kLanes, int kTokens, int kBits>
TDA_INLINE void DotRow(const CodeFormat<kBits>& weight, int64_t row, const DotInputs& inputs, int64_t token, float* y,
                       int64_t stride) {
  using Block = CodeBlock<kLanes, kBits>;
  using V = typename Block::V;
  constexpr int64_t kReach = CodeFormat<kBits>::kTileColumns;
  const typename V::Words of_lane = Block::GroupOfLane(weight.group_shift);
  const uint8_t* codes = weight.codes + row * weight.row_bytes;
  const float* values = inputs.values + token * inputs.size;
  const float* sums = inputs.sums + token * inputs.groups;
  Piece<uint8_t, CodeFormat<kBits>::CodeBytes(kReach)> piece;
  RowScales<kLanes, kBits> scales;
  typename V::Vector totals[kTokens] = {};
  for (int64_t begin = 0; begin < weight.columns; begin += kReach) {
    const int64_t columns = std::min(kReach, weight.columns - begin);
    const int64_t blocks = (columns + Block::kColumns - 1) / Block::kColumns;
    const int64_t first_group = begin >> weight.group_shift;
    const int64_t groups = ((columns - 1) >> weight.group_shift) + 1;
    const uint8_t* first = piece.Of(codes + weight.CodeBytes(begin), weight.CodeBytes(columns),
                                    blocks * kLanes * 4, weight.codes + weight.rows * weight.row_bytes);
    scales.Read(weight, row, first_group, groups);
    for (int64_t g = 0; g < groups; g += kLanes) {
      for (int t = 0; t < kTokens; ++t) {
        totals[t] -= V::Load(scales.zeros + g) * V::Load(sums + t * inputs.groups + first_group + g);
      }
    }
    for (int64_t block = 0; block < blocks; ++block) {
      __builtin_prefetch(first + block * kLanes * 4 + kDotAhead);
      const typename V::Words words = V::LoadWords(first + block * kLanes * 4);
      const float* x = values + begin + block * Block::kColumns;
      typename V::Vector parts[kTokens] = {};
      for (int k = 0; k < Block::kPerLane; ++k) {
        const typename V::Vector code = Block::Codes(words, k);
        for (int t = 0; t < kTokens; ++t) parts[t] += code * V::Load(x + t * inputs.size + k * kLanes);
      }
      const typename V::Vector scale =
          Block::Spread(scales.scales + (block * Block::kColumns >> weight.group_shift), of_lane);
      for (int t = 0; t < kTokens; ++t) totals[t] += scale * parts[t];
    }
  }
  for (int t = 0; t < kTokens; ++t) y[t * stride] = V::Sum(totals[t]);
}

// Compute y [tokens, rows] for the rows [begin, end), kTokens tokens at a time from `token` on, and what is left of them
// by halves of that.
template <int kLanes, int kTokens, int kBits>
TDA_INLINE void DotTokens(const CodeFormat<kBits>& weight, int64_t begin, int64_t end, const DotInputs& inputs,
                          int64_t token, float* y) {
  for (; token + kTokens <= inputs.tokens; token += kTokens) {
    for (int64_t row = begin; row < end; ++row) {
      DotRow<kLanes, kTokens>(weight, row, inputs, token, y + token * weight.rows + row, weight.rows);
    }
  }
  if constexpr (kTokens > 1) DotTokens<kLanes, kTokens / 2>(weight, begin, end, inputs, token, y);
}

}  // namespace tda
