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
//   Given Read(candidate)         after earlier kernels: what values are computed from, where reads of several candidates
//                                 would otherwise wait for computations between them
//   Complete()                    between Read and Values: what all values need
//   Values(candidate, given, k, values)  after earlier kernels: what each token multiplies it with; 0 where it does not
//                                 need it

constexpr int kRowsTogether = 4;  // neighbouring candidates that go to the same warp
constexpr int kLooks = 4;         // candidates that a lane looks at together
constexpr int kFilling = 4;       // places of a list that its readers may fill it up with

template <int kTokens>
struct alignas(kTokens == 1 ? 8 : 4) ListedRow {
  int row;
  float values[kTokens];
};

constexpr int kMostListed = kLooks * kWarp;

// The needed rows among the candidates that a warp looks at together.
template <int kTokens>
struct RowList {
  ListedRow<kTokens> rows[kMostListed + kFilling];

  __device__ __forceinline__ void Put(int at, int row, const float (&values)[kTokens]) {
    rows[at].row = row;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) rows[at].values[t] = values[t];
  }
};

template <RowsBy, int kTokens, class Format>
struct ReaderChoice;

// What a warp of AddRows has in shared memory. Of several tokens, rows come by registers.
template <int kTokens, class Format>
struct WarpRows {
  using Reader = typename ReaderChoice<kTokens == 1 ? Format::kRowsBy : RowsBy::kRegisters, kTokens, Format>::Type;

  typename Reader::List list;
  typename Reader::Room room;
};

static __device__ __forceinline__ void CommitCopies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until all but the last kPending groups of this thread's copies are there.
template <int kPending>
static __device__ __forceinline__ void WaitForCopies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

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

// By way of registers: while the rows of one half are added, those of the other are under way.
template <int kTokens, class Format>
struct RegisterReader {
  using List = RowList<kTokens>;
  struct Room {};
  using Column = decltype(static_cast<const Format*>(nullptr)->From(0));
  using Weights = decltype(static_cast<const Column*>(nullptr)->Load(0));
  static constexpr int kHalf = Format::kRowLoads / 2;
  static constexpr int kEarly = Format::kRowLoads;  // rows that are read before it is known which are needed
  static constexpr bool kEarlyListed = false;       // whether these are in the list, as its first ones

  const Column& column;
  WarpRows<kTokens, Format>& shared;
  float (&sums)[kTokens][Format::kWidth];
  Weights first[kEarly];

  // Read the rows of lanes 0 to kEarly - 1.
  __device__ __forceinline__ void Begin(int row) {
#pragma unroll
    for (int b = 0; b < kEarly; ++b) first[b] = column.Load(max(__shfl_sync(0xffffffffu, row, b), 0));
  }

  // Add what Begin has read, if it was called, and then the rows of the list. `values`: of each lane's first candidate.
  __device__ __forceinline__ void Add(bool begun, const float (&values)[kTokens], int listed_rows) {
    const int lane = threadIdx.x % kWarp;
    ListedRow<kTokens>* rows = shared.list.rows;
    // Loads come kEarly together: the last row fills the list up, times 0.
    const int end = (listed_rows + kEarly - 1) / kEarly * kEarly;
    if (listed_rows + lane < end) {
      constexpr float kNothing[kTokens] = {};
      shared.list.Put(listed_rows + lane, rows[listed_rows - 1].row, kNothing);
    }
    __syncwarp();
    if (begun) {
#pragma unroll
      for (int b = 0; b < kEarly; ++b) {
        float shared_values[kTokens];
#pragma unroll
        for (int t = 0; t < kTokens; ++t) shared_values[t] = __shfl_sync(0xffffffffu, values[t], b);
        if (Needed(shared_values)) AddScaled(first[b], shared_values, sums);  // 0 times what is there may be NaN
      }
    }
    const auto load = [&](int at, Weights(&half)[kHalf]) {
#pragma unroll
      for (int b = 0; b < kHalf; ++b) half[b] = column.Load(rows[at + b].row);
    };
    Weights halves[2][kHalf];
    if (end > 0) load(0, halves[0]);
#pragma unroll 1
    for (int at = 0; at < end; at += kEarly) {
      FewRows<Weights::kHalfSums && kTokens == 1, kTokens, Format::kWidth> few{sums};
      load(at + kHalf, halves[1]);
#pragma unroll
      for (int b = 0; b < kHalf; ++b) few.Add(halves[0][b], rows[at + b].values);
      if (at + kEarly < end) load(at + kEarly, halves[0]);
#pragma unroll
      for (int b = 0; b < kHalf; ++b) few.Add(halves[1][b], rows[at + kHalf + b].values);
      few.Finish();
    }
  }
};

// By way of a ring in shared memory: the rows that follow are under way while one is added. A thread reads only what it
// has copied itself, so shared memory stands in for registers: many more rows are under way than would fit those.
template <class Format>
struct RingReader {
  using Column = decltype(static_cast<const Format*>(nullptr)->From(0));
  using Weights = decltype(static_cast<const Column*>(nullptr)->Load(0));
  static constexpr int kRows = Format::kRingRows;
  static constexpr int kTogether = 4;  // the list is filled up to whole numbers of these
  static constexpr int kEarly = kRows;
  static constexpr bool kEarlyListed = true;
  static_assert(kRows % kTogether == 0 && kTogether <= kFilling && kEarly <= kWarp, "the list holds what fills it up");

  using List = RowList<1>;
  struct Room {
    alignas(16) unsigned words[kRows][kWarp * Format::kRingWords];
  };

  const Column& column;
  WarpRows<1, Format>& shared;
  float (&sums)[1][Format::kWidth];
  Weights packs[kRows];

  __device__ __forceinline__ unsigned Own() const {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared.room.words[0] + threadIdx.x % kWarp * Format::kRingWords));
  }

  static __device__ __forceinline__ unsigned Place(unsigned own, int b) { return own + b * sizeof(Room::words[0]); }

  __device__ __forceinline__ void Begin(int row) {
    const unsigned own = Own();
#pragma unroll
    for (int b = 0; b < kRows; ++b) {
      packs[b] = column.Start(max(__shfl_sync(0xffffffffu, row, b), 0), Place(own, b));
      CommitCopies();
    }
  }

  __device__ __forceinline__ void Add(bool begun, const float (&)[1], int listed_rows) {
    const int lane = threadIdx.x % kWarp;
    const unsigned own = Own();
    ListedRow<1>* rows = shared.list.rows;
    // Rows come kTogether at a time. What fills the list up is not read, and counts nothing.
    if (lane < kTogether) rows[listed_rows + lane].values[0] = 0.0f;
    __syncwarp();
    if (!begun) {
#pragma unroll
      for (int b = 0; b < kRows; ++b) {
        if (b < listed_rows) packs[b] = column.Start(rows[b].row, Place(own, b));
        CommitCopies();
      }
    }
#pragma unroll 1
    for (int at = 0; at < listed_rows; at += kRows) {
      FewRows<Weights::kHalfSums, 1, Format::kWidth> few{sums};
#pragma unroll
      for (int first = 0; first < kRows; first += kTogether) {
        if (at + first >= listed_rows) break;
#pragma unroll
        for (int b = first; b < first + kTogether; ++b) {
          WaitForCopies<kRows - 1>();
          column.Finish(Place(own, b), packs[b]);
          const float value = rows[at + b].values[0];
          if (value == 0.0f) packs[b].scale = 0;  // of a row that was read early, or not at all, where it may be NaN
          few.Add(packs[b], {value});
          if (at + b + kRows < listed_rows) packs[b] = column.Start(rows[at + b + kRows].row, Place(own, b));
          CommitCopies();
        }
      }
      few.Finish();
    }
  }
};

template <int kTokens, class Format>
struct ReaderChoice<RowsBy::kRegisters, kTokens, Format> {
  using Type = RegisterReader<kTokens, Format>;
};
template <class Format>
struct ReaderChoice<RowsBy::kRing, 1, Format> {
  using Type = RingReader<Format>;
};

// Add the rows of warp `warp` of `warps` to sums of a slice of columns. `ready` waits for earlier kernels; every warp calls
// it before it reads what values come from, if there are candidates, be they its own or not.
template <int kTokens, class Format, class Source, class Ready>
static __device__ __forceinline__ void AddRows(const Source& source, const Format& matrix, int count, int warp,
                                               int warps, int slice, WarpRows<kTokens, Format>& shared,
                                               float (&sums)[kTokens][Format::kWidth], Ready&& ready) {
  using Reader = typename WarpRows<kTokens, Format>::Reader;
  const auto weights = matrix.From(slice);
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
    Reader reader = {weights, shared, sums};
    const bool early = base == 0 && source.EveryRow();
    if (early) reader.Begin(candidates[0].row);
    ready();
    typename Source::Given given[kLooks];
#pragma unroll
    for (int j = 0; j < kLooks; ++j) given[j] = source.Read(candidates[j]);
    source.Complete();
    float values[kLooks][kTokens];
#pragma unroll
    for (int j = 0; j < kLooks; ++j) source.Values(candidates[j], given[j], base + j * stride + own, values[j]);
    int listed_rows = 0;
#pragma unroll
    for (int j = 0; j < kLooks; ++j) {
      const bool under_way = early && j == 0 && lane < Reader::kEarly;
      const bool listed = under_way ? Reader::kEarlyListed : Needed(values[j]);
      const unsigned all = __ballot_sync(0xffffffffu, listed);
      if (listed) shared.list.Put(listed_rows + __popc(all & lanes_before), candidates[j].row, values[j]);
      listed_rows += __popc(all);
    }
    __syncwarp();
    reader.Add(early, values[0], listed_rows);
    __syncwarp();
  }
}
