// Products of tokens with rows of codes by products of bytes (digits_cpu.h): code_dots_cpu.h's, for a few tokens.
#pragma once

#include "code_dots_cpu.h"
#include "digits_cpu.h"

namespace tda {

// Compute a token's digits, if they serve: for each block of codes, and each of the codes of a byte, those of one digit
// after another. Its sums become those of what the digits stand for.
template <int kLanes, int kBits>
TDA_INLINE void PrepareDigitsOf(const CodeFormat<kBits>& weight, const float* x, int64_t token,
                                const DotInputs& inputs) {
  inputs.steps[token] = -1.0f;
  if constexpr (kByteProducts<kLanes, kBits>) {
    constexpr int kPerByte = 8 / kBits, kBytes = kLanes * 4;
    float most = 0.0f;
    bool finite = HasByteProducts<kLanes>();
    for (int64_t i = 0; i < weight.columns; ++i) {
      const float size = std::fabs(x[i]);
      finite &= size < HUGE_VALF;
      most = std::max(most, size);
    }
    if (!finite || (most > 0.0f && most < kSmallestMost)) return;
    const float step = StepsFor<kLanes>(typename Lanes<kLanes>::Vector{} + most)[0], per_step = 1.0f / step;
    inputs.steps[token] = step;
    float* sums = inputs.sums + token * inputs.groups;
    std::fill_n(sums, inputs.groups, 0.0f);
    int8_t* digits = inputs.digits + token * inputs.size * kDigits;
    for (int64_t at = 0; at < inputs.size; at += kBytes * kPerByte) {
      for (int n = 0; n < kPerByte; ++n, digits += kBytes * kDigits) {
        for (int byte = 0; byte < kBytes; ++byte) {
          const int64_t column = at + byte * kPerByte + n;
          const float value = column < weight.columns ? x[column] : 0.0f;
          const auto steps = static_cast<int32_t>(std::lrintf(value * per_step));
          const uint32_t plus = static_cast<uint32_t>(steps) + 0x00808080u;
          if (column < weight.columns) sums[column >> weight.group_shift] += static_cast<float>(steps) * step;
          for (int d = 0; d < kDigits; ++d) {
            digits[d * kBytes + byte] = static_cast<int8_t>((plus >> 8 * d & 255) ^ 128);
          }
        }
      }
    }
  }
}

// Compute the products of kRows rows with a token, as lanes that are still to be added up.
template <int kLanes, int kRows, int kBits>
TDA_INLINE void DotDigits(const CodeFormat<kBits>& weight, int64_t row, const DotInputs& inputs, int64_t token,
                          typename Lanes<kLanes>::Vector (&totals)[kRows]) {
  using Block = CodeBlock<kLanes, kBits>;
  using B = Bytes<kLanes>;
  using V = typename Block::V;
  constexpr int kPerByte = 8 / kBits, kBytes = kLanes * 4;
  constexpr int64_t kReach = CodeFormat<kBits>::kTileColumns;
  const typename V::Words of_lane = V::Counting() * (4 * kPerByte) >> weight.group_shift;
  const float* sums = inputs.sums + token * inputs.groups;
  const float step = inputs.steps[token];
  Piece<uint8_t, CodeFormat<kBits>::CodeBytes(kReach)> piece;
  RowScales<kLanes, kBits> scales;
  for (int r = 0; r < kRows; ++r) {
    const int8_t* digits = inputs.digits + token * inputs.size * kDigits;
    const uint8_t* codes = weight.codes + (row + r) * weight.row_bytes;
    typename V::Vector total = {}, zero_total = {};
    for (int64_t begin = 0; begin < weight.columns; begin += kReach) {
      const int64_t columns = std::min(kReach, weight.columns - begin);
      const int64_t blocks = (columns + Block::kColumns - 1) / Block::kColumns;
      const int64_t first_group = begin >> weight.group_shift;
      const int64_t groups = ((columns - 1) >> weight.group_shift) + 1;
      const uint8_t* first = piece.Of(codes + weight.CodeBytes(begin), weight.CodeBytes(columns), blocks * kBytes,
                                      weight.codes + weight.rows * weight.row_bytes);
      scales.Read(weight, row + r, first_group, groups);
      for (int64_t g = 0; g < groups; g += kLanes) zero_total += V::Load(scales.zeros + g) * V::Load(sums + first_group + g);
      for (int64_t block = 0; block < blocks; ++block) {
        __builtin_prefetch(first + block * kBytes + kDotAhead);
        const typename V::Words words = V::LoadWords(first + block * kBytes);
        typename V::Integers parts[kDigits] = {};
        for (int n = 0; n < kPerByte; ++n, digits += kBytes * kDigits) {
          typename V::Words own = words;
          if constexpr (kBits == 4) own = own >> 4 * n & 0x0f0f0f0fu;
          for (int d = 0; d < kDigits; ++d) {
            const auto of_x = V::LoadWords(reinterpret_cast<const uint8_t*>(digits) + d * kBytes);
            parts[d] = B::AddProducts(parts[d], own, of_x);
          }
        }
        total += Block::Spread(scales.scales + (block * Block::kColumns >> weight.group_shift), of_lane) * B::Value(parts);
      }
    }
    totals[r] = total * step - zero_total;
  }
}

// Compute y of a token for the rows [begin, end).
template <int kLanes, int kBits>
TDA_INLINE void DotDigitRows(const CodeFormat<kBits>& weight, int64_t begin, int64_t end, const DotInputs& inputs,
                             int64_t token, float* y) {
  using V = Lanes<kLanes>;
  int64_t row = begin;
  for (; row + 4 <= end; row += 4) {
    typename V::Vector totals[4];
    DotDigits<kLanes>(weight, row, inputs, token, totals);
    V::SumsOfFour(totals, y + row);
  }
  for (; row < end; ++row) {
    typename V::Vector totals[1];
    DotDigits<kLanes>(weight, row, inputs, token, totals);
    y[row] = V::Sum(totals[0]);
  }
}

// Compute y [tokens, rows] for the rows [begin, end).
template <int kLanes, int kBits>
TDA_INLINE void DotRowsOf(const CodeFormat<kBits>& weight, int64_t begin, int64_t end, const DotInputs& inputs,
                          float* y) {
  for (int64_t first = begin; first < end; first += kRowsAtATime) {
    const int64_t stop = std::min(first + kRowsAtATime, end);
    if (!inputs.ByDigits()) {
      DotTokens<kLanes, (kLanes > 8 ? 8 : 4)>(weight, first, stop, inputs, 0, y);
      continue;
    }
    for (int64_t t = 0; t < inputs.tokens; ++t) {
      float* own = y + t * weight.rows;
      if constexpr (kByteProducts<kLanes, kBits>) {
        if (inputs.steps[t] >= 0.0f) {
          DotDigitRows<kLanes>(weight, first, stop, inputs, t, own);
          continue;
        }
      }
      for (int64_t row = first; row < stop; ++row) DotRow<kLanes, 1>(weight, row, inputs, t, own + row, weight.rows);
    }
  }
}

}  // namespace tda
