// Sums over rows of codes by products of bytes (digits_cpu.h), for the chunks of row_sums_cpu.h.
//
// Four rows are taken at once. Their codes of a column come to lie in the four bytes of a lane, beside the digits of what
// the rows are multiplied with: the token's value times the scale of row and group. Several tokens share the codes; a row
// that a token does not need is multiplied by 0 for it, which changes no sum.
#pragma once

#include "digits_cpu.h"
#include "row_list.h"

namespace tda {

constexpr int64_t kQuad = 4;
constexpr int64_t kQuadsAtOnce = 4;  // while a block's sums stay in registers; more ask for too many lines at once
constexpr int64_t kRowsOfQuads = kQuad * kQuadsAtOnce;
constexpr int64_t kBlocksAhead = 4;  // lines of a row that are asked for early

// The sums of a chunk's rows in a tile for some tokens, as integers, and what they need of the chunk.
template <int kLanes, int kBits, int kTokens>
class DigitSums {
  using Format = CodeFormat<kBits>;
  using Block = CodeBlock<kLanes, kBits>;
  using B = Bytes<kLanes>;
  using V = Lanes<kLanes>;
  using Vector = typename V::Vector;
  using Words = typename V::Words;
  using Integers = typename V::Integers;
  static constexpr int kPerByte = 8 / kBits;
  static constexpr int kVectors = Block::kPerLane;  // of a block
  static constexpr int kBlockBytes = kLanes * 4;

 public:
  // The most columns at once. Of several tokens, so few that the sums and digits of four of them stay in a first cache of
  // 48 KiB.
  static constexpr int64_t kMostColumns = kTokens > 1 ? 4 * Block::kColumns : Format::kTileColumns;

  TDA_INLINE DigitSums(const Format& weight, int64_t begin, int64_t end)
      : weight_(weight),
        begin_(begin),
        end_(end),
        blocks_((end - begin + Block::kColumns - 1) / Block::kColumns),
        first_group_(begin >> weight.group_shift),
        groups_(((end - 1) >> weight.group_shift) + 1 - first_group_),
        // 16 bytes of a block are of one group.
        group_of_lane_(V::Counting() / 4 * (16 * kPerByte) >> weight.group_shift),
        whole_rows_(WholeRows()) {}

  // Add the rows of a list to the sums [end - begin] of each token, whole blocks of them. The list and its values have room
  // for kQuad more. Returns the tokens whose rows could not be added, as bits: not where they or the scales are not finite,
  // or all products are very small. Their values are lost.
  TDA_INLINE unsigned AddRows(int32_t* rows, float* const* values, int64_t count, float* const* sums) {
    if (count == 0) return 0;
    Find(rows, 0, count);
    AskForFirst(std::min(count, kRowsOfQuads));
    unsigned failed = 0, used = 0;
    for (int t = 0; t < kTokens; ++t) {
      const float most = Most(values[t], count), largest_product = most * weight_.largest->most;
      if (largest_product >= kSmallestMost && largest_product < HUGE_VALF) {
        used |= 1u << t;
      } else {
        if (largest_product != 0.0f) failed |= 1u << t;
        std::fill_n(values[t], count, 0.0f);
      }
      SetSteps(t, used >> t & 1 ? most : 0.0f);
    }
    if (used == 0) return failed;
    for (; count % kQuad; ++count) {
      rows[count] = rows[count - 1];
      for (int t = 0; t < kTokens; ++t) values[t][count] = 0.0f;
    }
    for (int t = 0; t < kTokens; ++t) {
      std::fill_n(sums_[t], blocks_ * kVectors * kDigits, Integers{});
      std::fill_n(zero_sums_[t][0], kDigits * kGroups, 0);
    }
    for (int64_t start = 0; start < count; start += kRowsOfQuads) {
      Find(rows, start + kRowsOfQuads, count);
      AddQuads(values, start, std::min(count - start, kRowsOfQuads) / kQuad);
    }
    for (int t = 0; t < kTokens; ++t) {
      if (!(used >> t & 1)) continue;
      for (int64_t block = 0; block < blocks_; ++block) Complete(t, block, sums[t] + block * Block::kColumns);
    }
    return failed;
  }

 private:
  static constexpr int64_t kGroups = kMostColumns / kSmallestGroup + kLanes;

  struct RowCopy {
    uint8_t codes[Format::CodeBytes(kMostColumns)];
    uint16_t scales[kGroups];
    uint8_t zeros[kGroups];
  };
  // Where rows that are added together have what a tile needs of them.
  struct RowsOfQuads {
    const uint8_t* codes[kRowsOfQuads];
    const uint16_t* scales[kRowsOfQuads];
    const uint8_t* zeros[kRowsOfQuads];
    RowCopy copies[kRowsOfQuads];
  };

  // Rows from `start` on of a list. Those that are added and the next ones are kept.
  RowsOfQuads& Found(int64_t start) { return found_[start / kRowsOfQuads % 2]; }

  // Return the size of the largest value; not finite where one value is not.
  TDA_INLINE float Most(const float* values, int64_t count) const {
    Words largest = {};  // floats' bits without the sign: they are ordered as floats are, and NaN is above infinity
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const Words size = V::Bits(V::Load(values + i)) & 0x7fffffffu;
      largest = size > largest ? size : largest;
    }
    for (; i < count; ++i) {
      const Words size = V::Bits(Vector{} + values[i]) & 0x7fffffffu;
      largest = size > largest ? size : largest;
    }
    uint32_t most = 0;
    for (int lane = 0; lane < kLanes; ++lane) most = std::max(most, static_cast<uint32_t>(largest[lane]));
    float value;
    std::memcpy(&value, &most, sizeof(value));
    return value;
  }

  // Choose a token's steps of each group of columns, for values up to `most`.
  TDA_INLINE void SetSteps(int token, float most) {
    for (int64_t g = 0; g < groups_; g += kLanes) {
      const Vector steps = StepsFor<kLanes>(V::Load(weight_.largest->of_group.data() + first_group_ + g) * most);
      V::Store(steps_[token] + g, steps);
      V::Store(per_step_[token] + g, 1.0f / steps);
    }
  }

  // Find the rows of a list from `start` on, the last one in place of those beyond it, and ask for their scales and zero
  // points.
  TDA_INLINE void Find(const int32_t* rows, int64_t start, int64_t count) {
    RowsOfQuads& found = Found(start);
    for (int64_t r = 0; r < kRowsOfQuads; ++r) {
      const int64_t row = rows[std::min(start + r, count - 1)];
      found.codes[r] = weight_.codes + row * weight_.row_bytes + Format::CodeBytes(begin_);
      found.scales[r] = weight_.scales + row * weight_.groups + first_group_;
      found.zeros[r] = weight_.zeros + row * weight_.zero_bytes + Format::CodeBytes(first_group_);
      if (row >= whole_rows_) CopyRow(r, found);
      for (int64_t g = 0; g < groups_; g += kLine / 2) __builtin_prefetch(found.scales[r] + g);
      __builtin_prefetch(found.zeros[r]);
    }
  }

  // Ask for the codes with which the first rows of a list begin.
  TDA_INLINE void AskForFirst(int64_t count) {
    const int64_t piece_bytes = Format::CodeBytes(end_) - Format::CodeBytes(begin_);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t byte = 0; byte < std::min(piece_bytes, kBlocksAhead * kBlockBytes); byte += kLine) {
        __builtin_prefetch(Found(0).codes[r] + byte);
      }
    }
  }

  TDA_INLINE void AddQuads(float* const* values, int64_t start, int64_t quads) {
    const RowsOfQuads &rows = Found(start), &later = Found(start + kRowsOfQuads);
    for (int64_t q = 0; q < quads; ++q) Prepare(rows, q, values, start + q * kQuad);
    for (int64_t block = 0; block < blocks_; ++block) {
      const int64_t at = block * kBlockBytes, ahead = block + kBlocksAhead;
      const uint8_t* const* asked = ahead < blocks_ ? rows.codes : later.codes;
      const int64_t asked_at = (ahead < blocks_ ? ahead : std::max<int64_t>(ahead - blocks_, 0)) * kBlockBytes;
      if constexpr (kTokens == 1) {
        AddBlock(block, rows.codes, at, quads, asked, asked_at);
      } else {
        AddBlockOfTokens(block, rows.codes, at, quads, asked, asked_at);
      }
    }
  }

  // Return how many rows can be read in whole vectors: what follows them is still of their tensors.
  TDA_INLINE int64_t WholeRows() const {
    const auto whole = [&](int64_t row_size, int64_t begin, int64_t read) {
      const int64_t spare = weight_.rows * row_size - begin - read;
      return spare < 0 ? 0 : spare / row_size + 1;
    };
    const int64_t lanes = (groups_ + kLanes - 1) / kLanes * kLanes;
    return std::min({whole(weight_.row_bytes, Format::CodeBytes(begin_), blocks_ * kBlockBytes),
                     whole(weight_.groups, first_group_, lanes),
                     whole(weight_.zero_bytes, Format::CodeBytes(first_group_), Format::CodeBytes(lanes))});
  }

  // Have one of the rows read from a copy.
  TDA_INLINE void CopyRow(int64_t r, RowsOfQuads& rows) {
    RowCopy& copy = rows.copies[r];
    rows.codes[r] = static_cast<uint8_t*>(
        std::memcpy(copy.codes, rows.codes[r], Format::CodeBytes(end_) - Format::CodeBytes(begin_)));
    rows.scales[r] = static_cast<uint16_t*>(std::memcpy(copy.scales, rows.scales[r], groups_ * sizeof(uint16_t)));
    rows.zeros[r] = static_cast<uint8_t*>(std::memcpy(copy.zeros, rows.zeros[r], Format::CodeBytes(groups_)));
  }

  // Compute the digits of four rows from `row` of the list on, by group, and add them times the zero points. Past the last
  // group it is of no use.
  TDA_INLINE void Prepare(const RowsOfQuads& rows, int64_t quad, float* const* values, int64_t row) {
    const uint16_t* const* scales = rows.scales + quad * kQuad;
    const uint8_t* const* zeros = rows.zeros + quad * kQuad;
    for (int64_t g = 0; g < groups_; g += kLanes) {
      Vector own_scales[kQuad];
      const uint8_t* zeros_of[kQuad];
      for (int r = 0; r < kQuad; ++r) {
        own_scales[r] = V::LoadHalves(scales[r] + g);
        zeros_of[r] = zeros[r] + Format::CodeBytes(g);
      }
      const Words zero_points = CodesInOrder(zeros_of);
      for (int t = 0; t < kTokens; ++t) {
        Words in_steps[kQuad];
        for (int r = 0; r < kQuad; ++r) {
          in_steps[r] = B::InSteps(own_scales[r] * values[t][row + r], V::Load(per_step_[t] + g));
        }
        const Words digits[kDigits] = {B::template Digit<0>(in_steps), B::template Digit<1>(in_steps),
                                       B::template Digit<2>(in_steps)};
        for (int d = 0; d < kDigits; ++d) {
          StoreWords(digits_[t][quad][d] + g, digits[d]);
          const Integers sum = B::AddProducts(LoadIntegers(zero_sums_[t][d] + g), zero_points, digits[d]);
          StoreWords(zero_sums_[t][d] + g, reinterpret_cast<Words>(sum));
        }
      }
    }
  }

  // Return kLanes codes of four rows in order, a row's in each byte of a lane.
  static TDA_INLINE Words CodesInOrder(const uint8_t* const (&rows)[kQuad]) {
    if constexpr (kBits == 4) return B::CodesInOrder(rows);
    Words codes = {};
    for (int r = 0; r < kQuad; ++r) codes |= V::LoadBytes(rows[r]) << 8 * r;
    return codes;
  }

  // Read a block of four rows. Of its vectors of bytes, lane e of the l-th 16 bytes has the codes of byte
  // 16 l + 4 j + e, for the j-th of four.
  TDA_INLINE void ReadQuad(const uint8_t* const* first, int64_t at, const uint8_t* const* asked, int64_t asked_at,
                           Words (&quarters)[4]) const {
    Words rows[kQuad];
    for (int r = 0; r < kQuad; ++r) {
      rows[r] = V::LoadWords(first[r] + at);
      __builtin_prefetch(asked[r] + asked_at);
    }
    const Words low[2] = {B::LowBytes(rows[0], rows[1]), B::LowBytes(rows[2], rows[3])};
    const Words high[2] = {B::HighBytes(rows[0], rows[1]), B::HighBytes(rows[2], rows[3])};
    quarters[0] = B::LowPairs(low[0], low[1]);
    quarters[1] = B::HighPairs(low[0], low[1]);
    quarters[2] = B::LowPairs(high[0], high[1]);
    quarters[3] = B::HighPairs(high[0], high[1]);
  }

  // Return the n-th codes of bytes, times 1 << CodeShift(n).
  static TDA_INLINE Words Codes(Words bytes, int n) {
    if constexpr (kBits == 8) return bytes;
    if (CodeShift(n) > 0) return bytes & 0xf0f0f0f0u;
    return bytes >> 4 * n & 0x0f0f0f0fu;
  }

  // Upper codes stay where they are in their bytes, where products of such bytes have room.
  static constexpr int CodeShift(int n) { return kLanes == 16 && n > 0 ? 4 : 0; }

  TDA_INLINE void ReadDigits(int token, int64_t quad, int64_t group, Words (&digits)[kDigits]) const {
    for (int d = 0; d < kDigits; ++d) {
      digits[d] = __builtin_shuffle(LoadWords(digits_[token][quad][d] + group), group_of_lane_);
    }
  }

  // Add a block of all quads to the sums of a token: products(quad, digits, totals) adds those of a quad.
  template <class Products>
  TDA_INLINE void AddToTotals(int token, int64_t block, int64_t quads, const Products& products) {
    Integers* own = sums_[token] + block * kVectors * kDigits;
    Integers totals[kVectors][kDigits];
    for (int v = 0; v < kVectors; ++v) {
      for (int d = 0; d < kDigits; ++d) totals[v][d] = own[v * kDigits + d];
    }
    const int64_t group = block * Block::kColumns >> weight_.group_shift;
    for (int64_t q = 0; q < quads; ++q) {
      Words digits[kDigits];
      ReadDigits(token, q, group, digits);
      products(q, digits, totals);
    }
    for (int v = 0; v < kVectors; ++v) {
      for (int d = 0; d < kDigits; ++d) own[v * kDigits + d] = totals[v][d];
    }
  }

  TDA_INLINE void AddBlock(int64_t block, const uint8_t* const* first, int64_t at, int64_t quads,
                           const uint8_t* const* asked, int64_t asked_at) {
    const auto products = [&](int64_t q, const Words(&digits)[kDigits], Integers(&totals)[kVectors][kDigits])
        __attribute__((always_inline)) {
      Words quarters[4];
      ReadQuad(first + q * kQuad, at, asked + q * kQuad, asked_at, quarters);
      for (int j = 0; j < 4; ++j) {
        for (int n = 0; n < kPerByte; ++n) {
          const Words codes = Codes(quarters[j], n);
          Integers(&sum)[kDigits] = totals[j * kPerByte + n];
          for (int d = 0; d < kDigits; ++d) sum[d] = B::AddProducts(sum[d], codes, digits[d]);
        }
      }
    };
    AddToTotals(0, block, quads, products);
  }

  // Codes are made ready for all tokens before they are multiplied with the digits of one after another.
  TDA_INLINE void AddBlockOfTokens(int64_t block, const uint8_t* const* first, int64_t at, int64_t quads,
                                   const uint8_t* const* asked, int64_t asked_at) {
    for (int64_t q = 0; q < quads; ++q) {
      Words quarters[4];
      ReadQuad(first + q * kQuad, at, asked + q * kQuad, asked_at, quarters);
      for (int j = 0; j < 4; ++j) {
        for (int n = 0; n < kPerByte; ++n) codes_[q][j * kPerByte + n] = Codes(quarters[j], n);
      }
    }
    const auto products = [&](int64_t q, const Words(&digits)[kDigits], Integers(&totals)[kVectors][kDigits])
        __attribute__((always_inline)) {
      for (int v = 0; v < kVectors; ++v) {
        const Words codes = codes_[q][v];
        for (int d = 0; d < kDigits; ++d) totals[v][d] = B::AddProducts(totals[v][d], codes, digits[d]);
      }
    };
    for (int t = 0; t < kTokens; ++t) AddToTotals(t, block, quads, products);
  }

  // Add a block's sums of a token, less those of the zero points, times the steps, in the order of CodeBlock.
  TDA_INLINE void Complete(int token, int64_t block, float* sums) {
    const Vector steps = Block::Spread(steps_[token] + (block * Block::kColumns >> weight_.group_shift),
                                       Block::GroupOfLane(weight_.group_shift));
    const int64_t group = block * Block::kColumns >> weight_.group_shift;
    const Integers* own = sums_[token] + block * kVectors * kDigits;
    Integers zeros[kDigits];
    for (int d = 0; d < kDigits; ++d) {
      zeros[d] = reinterpret_cast<Integers>(__builtin_shuffle(LoadWords(zero_sums_[token][d] + group), group_of_lane_));
    }
    for (int n = 0; n < kPerByte; ++n) {
      Words quarters[4];
      for (int j = 0; j < 4; ++j) {
        const Integers* of = own + (j * kPerByte + n) * kDigits;
        const int shift = CodeShift(n);
        quarters[j] = V::Bits(
            B::Value({(of[0] >> shift) - zeros[0], (of[1] >> shift) - zeros[1], (of[2] >> shift) - zeros[2]}));
      }
      // Lane e of the j-th is column 16 bytes' 4 j + e: make it lane j of the e-th.
      const Words low_01 = B::LowWords(quarters[0], quarters[1]), high_01 = B::HighWords(quarters[0], quarters[1]);
      const Words low_23 = B::LowWords(quarters[2], quarters[3]), high_23 = B::HighWords(quarters[2], quarters[3]);
      const Words in_order[4] = {B::LowDoubleWords(low_01, low_23), B::HighDoubleWords(low_01, low_23),
                                 B::LowDoubleWords(high_01, high_23), B::HighDoubleWords(high_01, high_23)};
      for (int e = 0; e < 4; ++e) {
        float* to = sums + (e * kPerByte + n) * kLanes;
        V::Store(to, V::Load(to) + steps * V::FromBits(in_order[e]));
      }
    }
  }

  static TDA_INLINE Words LoadWords(const int32_t* address) {
    return V::LoadWords(reinterpret_cast<const uint8_t*>(address));
  }
  static TDA_INLINE Integers LoadIntegers(const int32_t* address) {
    return reinterpret_cast<Integers>(LoadWords(address));
  }
  static TDA_INLINE void StoreWords(int32_t* address, Words words) {
    std::memcpy(address, &words, sizeof(words));
  }

  const Format& weight_;
  const int64_t begin_, end_, blocks_, first_group_, groups_;
  const Words group_of_lane_;
  float steps_[kTokens][kGroups], per_step_[kTokens][kGroups];  // by group, from the tile's first on
  const int64_t whole_rows_;
  RowsOfQuads found_[2];  // of the present rows and the next ones
  Integers sums_[kTokens][kMostColumns / Block::kColumns * kVectors * kDigits];
  int32_t zero_sums_[kTokens][kDigits][kGroups];
  int32_t digits_[kTokens][kQuadsAtOnce][kDigits][kGroups];
  Words codes_[kTokens > 1 ? kQuadsAtOnce : 1][kVectors];  // of a block
};

}  // namespace tda
