// Which rows of a matrix a token reads, and what it multiplies them with.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.h"

namespace tda {

// What tokens decide by.
struct RowPrices {
  const float* row_price;  // [inputs]
  float price;

  // Return what x of row i counts for: 0 where the row is dropped. *Less*, not its opposite: a NaN is kept.
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

// List the rows in [begin, end) that x [inputs] needs, with what it multiplies them with. Returns how many there are.
TDA_INLINE int64_t ListRows(const float* x, const RowPrices& prices, int64_t begin, int64_t end, int32_t* rows,
                            float* values) {
  int64_t count = 0;
  for (int64_t i = begin; i < end; ++i) {
    const float kept = prices.Kept(x[i], i);
    rows[count] = static_cast<int32_t>(i);
    values[count] = kept;
    count += kept != 0.0f;
  }
  return count;
}

}  // namespace tda
