// Products of weight rows with activations, the heart of every kernel that reads weights: one warp a row.

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kWide = 8;  // elements of x that a thread loads at once

// Add weights . x of one load to the sums of every token.
template <int kTokens, int kWidth, class Weights>
static __device__ __forceinline__ void MultiplyAdd(const Weights& weights, const Element* x, int hidden, int tokens,
                                                   float* sums) {
  constexpr int kPart = kWidth < kWide ? kWidth : kWide;
  float w[kWidth];
  weights.ToFloats(w);
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    if (t > 0 && t >= tokens) break;
    float sum = Weights::kScale ? 0.0f : sums[t];
#pragma unroll
    for (int at = 0; at < kWidth; at += kPart) {
      float v[kPart];
      Load<kPart>(x + static_cast<size_t>(t) * hidden + at).ToFloats(v);
#pragma unroll
      for (int i = 0; i < kPart; ++i) sum = fmaf(w[at + i], v[i], sum);
    }
    if constexpr (Weights::kScale) {
      sums[t] = fmaf(weights.Scale(), sum, sums[t]);
    } else {
      sums[t] = sum;
    }
  }
}

// Compute the products of kRows rows with every token, by one warp. `ready` is called when the first loads of weights are
// under way and before x is read: weights are there from the start, x may still be on its way from an earlier kernel.
template <int kTokens, class Format, int kRows, class Ready>
static __device__ __forceinline__ void Products(const typename Format::Row (&rows)[kRows], const Element* x, int hidden,
                                                int tokens, int lane, float (&sums)[kRows][kTokens],
                                                const Ready& ready) {
  constexpr int kWidth = Format::kWidth;
  constexpr int kBatch = Format::kLoads / kRows;
  constexpr int kStep = kWarp * kWidth;  // elements that a warp loads at once
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int t = 0; t < kTokens; ++t) sums[r][t] = 0.0f;
  int column = lane * kWidth;
  const int last_batch = hidden - kBatch * kStep;  // where a whole batch fits for the last time
#pragma unroll 1
  for (; column - lane * kWidth <= last_batch; column += kBatch * kStep) {
    decltype(rows[0].Load(0)) weights[kRows][kBatch];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int b = 0; b < kBatch; ++b) weights[r][b] = rows[r].Load(column, b * kStep);
    ready();
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        MultiplyAdd<kTokens, kWidth>(weights[r][b], x + column + b * kStep, hidden, tokens, sums[r]);
      }
  }
  if (column - lane * kWidth < hidden) {  // what is left is no whole batch, and under way at once all the same
    decltype(rows[0].Load(0)) weights[kRows][kBatch];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        weights[r][b] = rows[r].LoadIf(column + b * kStep < hidden, column, b * kStep);
      }
    ready();
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (column + b * kStep >= hidden) break;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        MultiplyAdd<kTokens, kWidth>(weights[r][b], x + column + b * kStep, hidden, tokens, sums[r]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int t = 0; t < kTokens; ++t) sums[r][t] = WarpSum(sums[r][t]);
}

