// Sums of scaled weight rows, y = sum over rows of value * row, where only some rows are needed: the heart of the
// kernels whose weights lie input-major.
//
// A warp sums kSlice columns of the rows that are its own. Which rows those are depends on their place among the
// candidates and on the number of warps alone, and each warp adds its rows in order: which rows other tokens of the call
// need changes nothing.
//
// A Source says which rows are candidates and what they are multiplied with:
//
//   Candidate Look(k)             what can be known of candidate k before earlier kernels have ended; `row` is its index
//                                 in the matrix, -1 where there is none, as for a k of -1
//   EveryRow()                    all candidates are needed, bar zeros, and this is known before earlier kernels have
//                                 ended: the first rows are read meanwhile
//   Values(candidate, k, values)  after earlier kernels: what each token multiplies it with; 0 where it does not need it

constexpr int kRowLoads = 8;      // loads that a warp has under way at once, each of one row
constexpr int kRowsTogether = 4;  // neighbouring candidates that go to the same warp
constexpr int kLooks = 4;         // candidates that a lane looks at together

// The needed rows among the candidates that a warp looks at together.
template <int kTokens>
struct RowList {
  int rows[kLooks * kWarp];
  float values[kLooks * kWarp][kTokens];
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

// Add the rows of warp `warp` of `warps` at `column` to sums. `ready` waits for earlier kernels; it is called before
// values are asked for, if there are candidates.
template <int kTokens, class Format, class Source, class Ready>
static __device__ __forceinline__ void AddRows(const Source& source, const Format& matrix, int count, int warp,
                                               int warps, int column, RowList<kTokens>& list,
                                               float (&sums)[kTokens][Format::kWidth], const Ready& ready) {
  using Weights = decltype(matrix.At(0).Load(0));
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
        const int row = __shfl_sync(0xffffffffu, candidates[0].row, b);
        first[b] = matrix.At(max(row, 0)).LoadIf(row >= 0, column);
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
        const int place = listed_rows + __popc(all & lanes_before);
        list.rows[place] = candidates[j].row;
#pragma unroll
        for (int t = 0; t < kTokens; ++t) list.values[place][t] = values[j][t];
      }
      listed_rows += __popc(all);
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
#pragma unroll 1
    for (int at = 0; at < listed_rows; at += kRowLoads) {
      Weights weights[kRowLoads];
#pragma unroll
      for (int b = 0; b < kRowLoads; ++b) {
        const bool there = at + b < listed_rows;
        weights[b] = matrix.At(list.rows[there ? at + b : at]).LoadIf(there, column);
      }
#pragma unroll
      for (int b = 0; b < kRowLoads; ++b) {
        float shared[kTokens];
#pragma unroll
        for (int t = 0; t < kTokens; ++t) shared[t] = at + b < listed_rows ? list.values[at + b][t] : 0.0f;
        AddScaled(weights[b], shared, sums);
      }
    }
    __syncwarp();
  }
}

