// The rows of a matrix that a token needs, and their factors.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.h"

namespace tda {

// The data that decide which rows a token needs.
struct RowPrices {
  const float* row_price;  // [inputs]
  float price;

  // Return the factor of row i: x, or 0 where the row is dropped. The comparison is *Less*, not the negation of its
  // opposite, so that a NaN is kept.
  TDA_INLINE float Kept(float x, int64_t i) const { return x * x * row_price[i] < price ? 0.0f : x; }
};

// Rows in order, those that are read soon asked for early.
struct RowList {
  const int32_t* rows;
  const float* values;  // what each row is multiplied with
  int64_t count;
  int64_t ahead;  // rows

  TDA_INLINE int64_t At(int64_t i) const { return rows[i]; }
  TDA_INLINE int64_t Ahead(int64_t i) const { return rows[std::min(i + ahead, count - 1)]; }
};

// List the rows in [begin, end) that x [inputs] needs, with their factors. Returns how many there are. There is room
// for end - begin rows.
template <int kLanes>
TDA_INLINE int64_t ListRows(const float* x, const RowPrices& prices, int64_t begin, int64_t end, int32_t* rows,
                            float* values) {
  int64_t count = 0, i = begin;
#if defined(__x86_64__) && defined(__GNUC__)
  if constexpr (kLanes == 16) {
    using V = Lanes<kLanes>;
    typename V::Words numbers = V::Counting() + static_cast<uint32_t>(begin);
    const typename V::Vector price = typename V::Vector{} + prices.price;
    for (; i + kLanes <= end; i += kLanes) {
      const typename V::Vector own = V::Load(x + i), worth = own * own * V::Load(prices.row_price + i);
      typename V::Words kept_rows;
      typename V::Vector kept;
      uint16_t needed, other;  // bits of lanes: not less, and not zero
      asm("vcmpnltps %2, %1, %0" : "=Yk"(needed) : "v"(worth), "v"(price));
      asm("vcmpneqps %2, %1, %0" : "=Yk"(other) : "v"(own), "v"(typename V::Vector{}));
      needed &= other;
      asm("vpcompressd %1, %0%{%2%}%{z%}" : "=v"(kept_rows) : "v"(numbers), "Yk"(needed));
      asm("vcompressps %1, %0%{%2%}%{z%}" : "=v"(kept) : "v"(own), "Yk"(needed));
      std::memcpy(rows + count, &kept_rows, sizeof(kept_rows));
      V::Store(values + count, kept);
      count += __builtin_popcount(needed);
      numbers += static_cast<uint32_t>(kLanes);
    }
  }
#endif
  for (; i < end; ++i) {
    const float kept = prices.Kept(x[i], i);
    rows[count] = static_cast<int32_t>(i);
    values[count] = kept;
    count += kept != 0.0f;
  }
  return count;
}

}  // namespace tda
