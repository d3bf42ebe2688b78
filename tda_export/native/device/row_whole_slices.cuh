// Sums of one token's rows by blocks that stay: a cluster takes several neighbouring slices of columns, its blocks share
// the rows, and every warp of a block adds rows of a slice of its own, by matrices. So a block lists its rows once, not
// once for each slice, a warp adds all of its rows without a pause, and sums meet once, in shared memory of the cluster.
//
// A block's warps are `parts` times one for each of its slices, and those left over have nothing to do. Rows are dealt,
// kRowsTogether neighbours at a time, to as many shares as the cluster's blocks have parts together. Which warp adds a row,
// and after which others, depends on the shape of the matrix alone (and on how many blocks the host gives a cluster).

#if TDA_HALF_CODES && TDA_CLUSTERS

// Who has what; the grid is (blocks of a cluster, clusters).
template <int kBlockWarps>
struct WholeShares {
  __device__ __forceinline__ WholeShares(unsigned all_slices, unsigned inputs)
      : slices((all_slices + gridDim.y - 1) / gridDim.y),
        parts(kBlockWarps / slices),
        shares(gridDim.x * parts),
        first_slice(blockIdx.y * slices),
        present(min(slices, all_slices - min(first_slice, all_slices))),
        slice(threadIdx.x / kWarp % slices),
        part(threadIdx.x / kWarp / slices),
        share(blockIdx.x * parts + part),
        inputs(inputs),
        room(RoundUp(RoundUp(inputs, kRowsTogether * shares) / shares, kWholeRows)) {}

  static constexpr unsigned kWholeRows = 16;  // of a matrix

  static __device__ __forceinline__ unsigned RoundUp(unsigned number, unsigned unit) {
    return (number + unit - 1) / unit * unit;
  }

  __device__ __forceinline__ bool Lists() const { return part < parts; }
  __device__ __forceinline__ bool Adds() const { return Lists() && slice < present; }

  // Row k of this warp's share, or -1.
  __device__ __forceinline__ int Row(unsigned k) const {
    const unsigned row = (k / kRowsTogether * shares + share) * kRowsTogether + k % kRowsTogether;
    return row < inputs ? row : -1;
  }

  const unsigned slices;       // of a block
  const unsigned parts;        // of its warps
  const unsigned shares;       // of the rows
  const unsigned first_slice;  // of this block
  const unsigned present;      // slices of this block, fewer in the last cluster
  const unsigned slice, part, share;  // of this warp
  const unsigned inputs;
  const unsigned room;  // for the rows of a share
};

template <class Format, int kBlockWarps>
struct WholeSlices {
  using Sums = MatrixSums<Format>;
  using Shares = WholeShares<kBlockWarps>;
  static constexpr int kRows = Sums::kRows, kSlots = Format::kSlots;
  static_assert(kRows == Shares::kWholeRows, "lists have room for whole matrices");

  struct Counts {
    unsigned listed[2][kBlockWarps];  // by each warp, in this turn and the next
    unsigned largest[kBlockWarps];    // magnitude of a warp's values
  };

  const Shares& own;
  Counts& counts;
  int* rows;               // of the share
  unsigned short* values;  // likewise
  typename Sums::Slot (&slots)[kSlots];

  // List the needed rows of each part's share, with all of its warps, and return how many this part has. All warps call it.
  template <class Source, class Ready>
  __device__ __forceinline__ int List(const Source& source, Ready&& ready) const {
    constexpr unsigned kMagnitude = 0x7fff;
    const unsigned warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, lanes_before = (1u << lane) - 1;
    // A warp looks at neighbours, so a list is in order. The looks are no more than all warps together need.
    const unsigned of_warps = own.slices * kWarp, looks = min((own.room + of_warps - 1) / of_warps, kLooks);
    unsigned listed_rows = 0, largest = 0, turn = 0;
#pragma unroll 1
    for (unsigned base = 0; base < own.room; base += looks * of_warps, turn ^= 1) {
      const unsigned first = base + own.slice * looks * kWarp + lane;
      // All looks at once, so that reads do not wait for each other; those beyond `looks` find no row.
      typename Source::Candidate candidates[kLooks];
#pragma unroll
      for (int j = 0; j < kLooks; ++j) {
        candidates[j] = source.Look(own.Lists() && j < looks ? own.Row(first + j * kWarp) : -1);
      }
      ready();
      typename Source::Given given[kLooks];
#pragma unroll
      for (int j = 0; j < kLooks; ++j) given[j] = source.Read(candidates[j]);
      source.Complete();
      float row_values[kLooks][1];
#pragma unroll
      for (int j = 0; j < kLooks; ++j) source.Values(candidates[j], given[j], 0, row_values[j]);
      unsigned halves[kLooks], needed[kLooks], count = 0;
#pragma unroll
      for (int j = 0; j < kLooks; ++j) {
        if (j >= looks) break;
        halves[j] = ToHalves(row_values[j][0], 0.0f);
        needed[j] = __ballot_sync(0xffffffffu, Needed(row_values[j]));
        count += __popc(needed[j]);
        largest = max(largest, halves[j] & kMagnitude);
      }
      const unsigned of_warp = __reduce_max_sync(0xffffffffu, largest);
      if (lane == 0) {
        counts.listed[turn][warp] = count;
        counts.largest[warp] = of_warp;
      }
      __syncthreads();
      if (!own.Lists()) continue;
      const unsigned of_lane = lane < own.slices ? counts.listed[turn][own.part * own.slices + lane] : 0;
      unsigned at = listed_rows + __reduce_add_sync(0xffffffffu, lane < own.slice ? of_lane : 0);
      listed_rows += __reduce_add_sync(0xffffffffu, of_lane);
#pragma unroll
      for (int j = 0; j < kLooks; ++j) {
        if (j >= looks) break;
        if (needed[j] >> lane & 1) {
          const unsigned place = at + __popc(needed[j] & lanes_before);
          rows[place] = candidates[j].row;
          values[place] = static_cast<unsigned short>(halves[j]);
        }
        at += __popc(needed[j]);
      }
    }
    // Values of 0 fill the last matrix up.
    const bool fills = own.Lists() && own.slice == 0 && lane < (kRows - listed_rows % kRows) % kRows;
    if (fills) values[listed_rows + lane] = 0;
    __syncthreads();
    return listed_rows;
  }

  // Add the listed rows of this warp's slice.
  __device__ __forceinline__ void Add(const Sums& matrices, int listed_rows) const {
    const int lane = threadIdx.x % kWarp;
    // The last row fills the last matrix up.
    const auto start = [&](int s, int at) {
      if (at < listed_rows) {
        matrices.Start(slots[s], [&](int r) { return rows[min(at + r, listed_rows - 1)]; });
      } else {
        CommitCopies();
      }
    };
#pragma unroll
    for (int s = 0; s < kSlots; ++s) start(s, s * kRows);
    const unsigned of_warp = lane < own.slices ? counts.largest[own.part * own.slices + lane] : 0;
    const unsigned power = Sums::PowerOf(__reduce_max_sync(0xffffffffu, of_warp));
    float products[Sums::kRun][4] = {}, zero_products[4] = {};
    int s = 0;
#pragma unroll 1
    for (int at = 0; at < listed_rows; at += kRows) {
      WaitForCopies<kSlots - 1>();
      __syncwarp();
      matrices.AddMatrix(slots[s], values + at, power << Sums::kFraction, products, zero_products);
      __syncwarp();
      start(s, at + kSlots * kRows);
      s = s + 1 == kSlots ? 0 : s + 1;
    }
    matrices.Finish(products, zero_products, Sums::FullCode(power));
  }
};

// Where the sums of all shares meet: [slices of a block, shares, columns of a part]. The first blocks of the cluster, a
// power of two, add up equal parts of each slice, whole warps of columns.
template <class Format, int kBlockWarps>
struct WholeTotals {
  using Shares = WholeShares<kBlockWarps>;
  static constexpr unsigned kSlice = kWarp * Format::kWidth, kSliceShift = 31 - Zeros(kSlice);
  static constexpr unsigned kThreads = kBlockWarps * kWarp;

  __device__ __forceinline__ WholeTotals(const Shares& own, float* received, ClusterInbox& inbox)
      : own(own),
        received(received),
        inbox(inbox),
        shift(Shift()),
        cells(blockIdx.x < kSlice >> shift ? own.present << shift : 0) {
    inbox.Begin(cells * own.shares);
  }

  // A part has 2^Shift() columns of a slice.
  static __device__ __forceinline__ unsigned Shift() {
    return kSliceShift - min(31u - static_cast<unsigned>(__clz(gridDim.x)), 31 - Zeros(Format::kWidth));
  }

  // Floats that a block has room for.
  __device__ __forceinline__ unsigned Room() const { return own.slices * own.shares << shift; }

  __device__ __forceinline__ float* Received(unsigned slice, unsigned share) const {
    return received + ((slice * own.shares + share) << shift);
  }

  // Send this warp's sums to the blocks that add them up.
  __device__ __forceinline__ void Send(const float (&sums)[1][Format::kWidth]) const {
    constexpr int kRun = Format::Lanes::kRun;
#pragma unroll
    for (int i = 0; i < Format::kWidth; i += kRun) {
      const unsigned column = Format::Lanes::Column(threadIdx.x % kWarp, i);
      float run[kRun];
#pragma unroll
      for (int j = 0; j < kRun; ++j) run[j] = sums[0][i + j];
      inbox.Send(Received(own.slice, own.share) + column % (1u << shift), column >> shift, run);
    }
  }

  __device__ __forceinline__ Totals::Column ColumnOf(unsigned cell) const {
    return {(own.first_slice + (cell >> shift)) * kSlice + (blockIdx.x << shift) + cell % (1u << shift)};
  }

  // Send the sums of a warp that adds, and store this block's part of the totals, when all shares are there.
  __device__ __forceinline__ void Store(const float (&sums)[1][Format::kWidth], const Totals& totals) const {
    // What is read of a thread's first cell does not wait for other blocks.
    Totals::Ahead ahead = {};
    if (threadIdx.x < cells) ahead = totals.Read(ColumnOf(threadIdx.x));
    inbox.WaitForBlocks();
    if (own.Adds()) Send(sums);
    if (cells > 0) inbox.WaitForFloats();
    ForCells<kBlockWarps * kSlice, kThreads>(cells, [&](unsigned cell) {
      const Totals::Column column = ColumnOf(cell);
      if (cell >= kThreads) ahead = totals.Read(column);
      const float* place = Received(cell >> shift, 0) + cell % (1u << shift);
      float sum = ahead.first;
#pragma unroll 8
      for (unsigned share = 0; share < own.shares; ++share) sum += place[share << shift];
      totals.Store(column, sum, ahead);
    });
  }

  const Shares& own;
  float* const received;
  ClusterInbox& inbox;
  const unsigned shift;
  const unsigned cells;  // that this block adds up
};

#endif
