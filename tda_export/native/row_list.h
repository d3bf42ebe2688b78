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

#if defined(__x86_64__) && defined(__GNUC__)
// Return the lanes of x whose rows are kept, as bits: not worth less, and not zero.
template <int kLanes>
TDA_INLINE uint16_t KeptLanes(typename Lanes<kLanes>::Vector x, typename Lanes<kLanes>::Vector row_price,
                              typename Lanes<kLanes>::Vector price) {
  uint16_t not_less, not_zero;
  asm("vcmpnltps %2, %1, %0" : "=Yk"(not_less) : "v"(x * x * row_price), "v"(price));
  asm("vcmpneqps %2, %1, %0" : "=Yk"(not_zero) : "v"(x), "v"(typename Lanes<kLanes>::Vector{}));
  return not_less & not_zero;
}
#endif

// List the rows in [begin, end) that at least one of kTokens tokens needs, x [kTokens, inputs], with the factors of each
// token, 0 where it does not need the row. Returns how many there are. There is room for end - begin rows.
template <int kLanes, int kTokens>
TDA_INLINE int64_t ListRows(const float* x, int64_t inputs, const RowPrices& prices, int64_t begin, int64_t end,
                            int32_t* rows, float* const (&values)[kTokens]) {
  int64_t count = 0, i = begin;
#if defined(__x86_64__) && defined(__GNUC__)
  if constexpr (kLanes == 16) {
    using V = Lanes<kLanes>;
    typename V::Words numbers = V::Counting() + static_cast<uint32_t>(begin);
    const typename V::Vector price = typename V::Vector{} + prices.price;
    for (; i + kLanes <= end; i += kLanes) {
      const typename V::Vector row_price = V::Load(prices.row_price + i);
      uint16_t kept[kTokens], any = 0;
      for (int t = 0; t < kTokens; ++t) any |= kept[t] = KeptLanes<kLanes>(V::Load(x + t * inputs + i), row_price, price);
      typename V::Words listed;
      asm("vpcompressd %1, %0%{%2%}%{z%}" : "=v"(listed) : "v"(numbers), "Yk"(any));
      std::memcpy(rows + count, &listed, sizeof(listed));
      for (int t = 0; t < kTokens; ++t) {
        typename V::Vector factors = V::Load(x + t * inputs + i);
        if constexpr (kTokens > 1) asm("vmovaps %0, %0%{%1%}%{z%}" : "+v"(factors) : "Yk"(kept[t]));
        asm("vcompressps %1, %0%{%2%}%{z%}" : "=v"(factors) : "v"(factors), "Yk"(any));
        V::Store(values[t] + count, factors);
      }
      count += __builtin_popcount(any);
      numbers += static_cast<uint32_t>(kLanes);
    }
  }
#endif
  for (; i < end; ++i) {
    bool any = false;
    for (int t = 0; t < kTokens; ++t) {
      const float kept = prices.Kept(x[t * inputs + i], i);
      values[t][count] = kept;
      any |= kept != 0.0f;
    }
    rows[count] = static_cast<int32_t>(i);
    count += any;
  }
  return count;
}

}  // namespace tda
