// Sums of scaled weight rows, y = sum over rows of value * row, where only some rows are needed: the heart of the
// kernels whose weights lie input-major.
//
// A warp sums kSlice columns of the rows that are its own. Which rows these are depends only on their place among the
// candidates and on the number of warps, and each warp adds its rows in order. So the rows that other tokens of the
// call need do not change a result.
//
// A Source says which rows are candidates and what they are multiplied with:
//
//   Candidate Look(k)             what can be known of candidate k before earlier kernels have ended; `row` is its index
//                                 in the matrix, -1 where there is none, as for a k of -1
//   EveryRow()                    all candidates are needed, bar zeros, and this is known before earlier kernels have
//                                 ended: the first rows are read meanwhile
//   Values(candidate, k, values)  after earlier kernels: what each token multiplies it with; 0 where it does not need it

constexpr int kRowsTogether = 4;  // neighbouring candidates that go to the same warp
constexpr int kLooks = 4;         // candidates that a lane looks at together

template <int kTokens>
struct alignas(kTokens == 1 ? 8 : 4) ListedRow {
  int row;
  float values[kTokens];
};

// The needed rows among the candidates that a warp looks at together.
template <int kTokens>
struct RowList {
  ListedRow<kTokens> rows[kLooks * kWarp];
};

template <int kTokens>
static __device__ __forceinline__ bool Needed(const float (&values)[kTokens]) {
  bool needed = false;
#pragma unroll
  for (int t = 0; t < kTokens; ++t) needed |= values[t] != 0.0f;  // NaN is
  return needed;
}

template <int kTokens, int kWidth, class Weights>
static __device__ __forceinline__ void AddScaled(const Weights& weights, const float (&values)[kTokens],
                                                 float (&sums)[kTokens][kWidth]) {
  float w[kWidth];
  weights.ToFloats(w);
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    float value = values[t];
    if constexpr (Weights::kScale) value *= weights.Scale();
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sums[t][i] = fmaf(value, w[i], sums[t][i]);
  }
}

// How a few rows are added: each by itself.
template <bool kHalves, int kTokens, int kWidth>
struct FewRows {
  float (&sums)[kTokens][kWidth];

  template <class Weights>
  __device__ __forceinline__ void Add(const Weights& weights, const float (&values)[kTokens]) {
    AddScaled(weights, values, sums);
  }
  __device__ __forceinline__ void Finish() {}
};

// Or in float16 first, of one token: products are rounded as elements of float16 would be, and take half the time.
template <int kWidth>
struct FewRows<true, 1, kWidth> {
  float (&sums)[1][kWidth];
  unsigned halves[kWidth / 2] = {};

  template <class Weights>
  __device__ __forceinline__ void Add(const Weights& weights, const float (&values)[1]) {
    weights.AddHalves(values[0], halves);
  }
  __device__ __forceinline__ void Finish() {
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) {
      float low, high;
      HalvesToFloats(halves[i], low, high);
      sums[0][i / 4 * 8 + i % 4] += low;
      sums[0][i / 4 * 8 + i % 4 + 4] += high;
    }
  }
};

// Add the rows of warp `warp` of `warps` at `column` to sums. `ready` waits for earlier kernels; it is called before
// values are asked for, if there are candidates.
template <int kTokens, class Format, class Source, class Ready>
static __device__ __forceinline__ void AddRows(const Source& source, const Format& matrix, int count, int warp,
                                               int warps, int column, RowList<kTokens>& list,
                                               float (&sums)[kTokens][Format::kWidth], const Ready& ready) {
  using Weights = decltype(matrix.From(0).Load(0));
  constexpr int kRowLoads = Format::kRowLoads;
  constexpr int kHalf = kRowLoads / 2;
  const auto weights = matrix.From(column);
  const int lane = threadIdx.x % kWarp;
  const int own = (lane / kRowsTogether * warps + warp) * kRowsTogether + lane % kRowsTogether;
  const int stride = warps * kWarp;
  const unsigned lanes_before = (1u << lane) - 1;
  for (int base = 0; base < count; base += kLooks * stride) {
    typename Source::Candidate candidates[kLooks];
#pragma unroll
    for (int j = 0; j < kLooks; ++j) {
      const int k = base + j * stride + own;
      candidates[j] = source.Look(k < count ? k : -1);
    }
    Weights first[kRowLoads];
    const bool early = base == 0 && source.EveryRow();
    if (early) {
#pragma unroll
      for (int b = 0; b < kRowLoads; ++b) {
        first[b] = weights.Load(max(__shfl_sync(0xffffffffu, candidates[0].row, b), 0));
      }
    }
    ready();
    float values[kLooks][kTokens];
#pragma unroll
    for (int j = 0; j < kLooks; ++j) source.Values(candidates[j], base + j * stride + own, values[j]);
    int listed_rows = 0;
#pragma unroll
    for (int j = 0; j < kLooks; ++j) {
      const bool under_way = early && j == 0 && lane < kRowLoads;
      const bool listed = Needed(values[j]) && !under_way;
      const unsigned all = __ballot_sync(0xffffffffu, listed);
      if (listed) {
        ListedRow<kTokens>& place = list.rows[listed_rows + __popc(all & lanes_before)];
        place.row = candidates[j].row;
#pragma unroll
        for (int t = 0; t < kTokens; ++t) place.values[t] = values[j][t];
      }
      listed_rows += __popc(all);
    }
    __syncwarp();
    // Loads come kRowLoads together: the last row fills the list up, times 0.
    const int end = (listed_rows + kRowLoads - 1) / kRowLoads * kRowLoads;
    if (listed_rows + lane < end) {
      ListedRow<kTokens>& place = list.rows[listed_rows + lane];
      place.row = list.rows[listed_rows - 1].row;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) place.values[t] = 0.0f;
    }
    __syncwarp();
    if (early) {
#pragma unroll
      for (int b = 0; b < kRowLoads; ++b) {
        float shared[kTokens];
#pragma unroll
        for (int t = 0; t < kTokens; ++t) shared[t] = __shfl_sync(0xffffffffu, values[0][t], b);
        if (Needed(shared)) AddScaled(first[b], shared, sums);  // 0 times what is there may be NaN
      }
    }
    // While the rows of one half are added, those of the other are under way.
    const auto load = [&](int at, Weights(&half)[kHalf]) {
#pragma unroll
      for (int b = 0; b < kHalf; ++b) half[b] = weights.Load(list.rows[at + b].row);
    };
    Weights halves[2][kHalf];
    if (end > 0) load(0, halves[0]);
#pragma unroll 1
    for (int at = 0; at < end; at += kRowLoads) {
      FewRows<Weights::kHalfSums && kTokens == 1, kTokens, Format::kWidth> rows{sums};
      load(at + kHalf, halves[1]);
#pragma unroll
      for (int b = 0; b < kHalf; ++b) rows.Add(halves[0][b], list.rows[at + b].values);
      if (at + kRowLoads < end) load(at + kRowLoads, halves[0]);
#pragma unroll
      for (int b = 0; b < kHalf; ++b) rows.Add(halves[1][b], list.rows[at + kHalf + b].values);
      rows.Finish();
    }
    __syncwarp();
  }
}
