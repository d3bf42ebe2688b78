// From the sums of each warp to the result: warps of a block are added in shared memory, then the blocks that share a
// slice of columns (those along the grid's x), always in the same order.

// A cell is a token's sum of a column. The sums of a lane are neighbours, so four of them are stored at once; they are
// turned by their lane, so that lanes meet different banks.
template <int kTokens, int kWidth, int kBlockWarps>
struct WarpSums {
  static constexpr unsigned kFours = kWidth / 4;  // 0: one column a lane

  static __device__ __forceinline__ unsigned Place(unsigned cell) {
    if constexpr (kFours == 0) {
      return cell;
    } else {
      const unsigned lane = cell / kWidth, four = cell % kWidth / 4;
      return lane * kWidth + (four + lane * kWidth / kWarp) % kFours * 4 + cell % 4;
    }
  }

  alignas(16) float cells[kBlockWarps][kTokens * kWarp * kWidth];
};

constexpr int kAnyTokens = 0;  // of a cell: not one alone

// Where the totals of a slice (blockIdx.y) and a tile of tokens go.
struct Totals {
  const Element* bias;      // [columns] or null
  const Element* residual;  // [tokens, columns] or null: what is added to a total once it is rounded
  Element* y;               // [tokens, columns]
  float* squares;           // [tokens, SquareParts(columns)] of y, or null
  unsigned columns, first_token, tokens;

  // What is read of a cell's column: what its sum begins with, and the residual.
  struct Ahead {
    float first, residual;
  };

  template <int kTokens, int kSlice>
  struct Cell {
    __device__ __forceinline__ Cell(const Totals& totals, unsigned cell)
        : column(blockIdx.y * kSlice + cell % kSlice),
          token(kTokens == 1 ? 0 : totals.first_token + cell / kSlice),
          wanted(column < totals.columns && (kTokens == 1 || token < totals.tokens)) {}

    __device__ __forceinline__ size_t Place(unsigned columns) const {
      return kTokens == 1 ? column : static_cast<size_t>(token) * columns + column;
    }

    const unsigned column, token;
    const bool wanted;
  };

  // A column of one token, which is there.
  struct Column {
    static constexpr unsigned token = 0;
    static constexpr bool wanted = true;

    __device__ __forceinline__ size_t Place(unsigned) const { return column; }

    const unsigned column;
  };

  template <class Cell>
  __device__ __forceinline__ Ahead Read(const Cell& cell) const {
    Ahead ahead = {};
    if (cell.wanted && bias != nullptr) ahead.first = ToFloat(bias[cell.column]);
    if (cell.wanted && residual != nullptr) ahead.residual = ToFloat(residual[cell.Place(columns)]);
    return ahead;
  }

  // Store the total of a cell, if it is wanted. All lanes of a warp call it, with neighbouring cells.
  template <class Cell>
  __device__ __forceinline__ void Store(const Cell& cell, float total, const Ahead& ahead) const {
    Element stored = FromFloat(total);
    if (residual != nullptr) stored = FromFloat(ToFloat(stored) + ahead.residual);
    if (cell.wanted) y[cell.Place(columns)] = stored;
    if (squares == nullptr) return;
    const float value = cell.wanted ? ToFloat(stored) : 0.0f, square = WarpSum(__fmul_rn(value, value));
    if (cell.wanted && cell.column % kWarp == 0) {
      squares[cell.token * SquareParts(columns) + cell.column / kWarp] = square;
    }
  }
};

// Call `visit` with the cells of a thread, of so many: whole warps of cells, and at most kMost.
template <unsigned kMost, unsigned kThreads, class Visit>
static __device__ __forceinline__ void ForCells(unsigned cells, const Visit& visit) {
  if constexpr (kMost <= kThreads) {
    if (threadIdx.x < cells) visit(threadIdx.x);
  } else {
#pragma unroll 1
    for (unsigned cell = threadIdx.x; cell < cells; cell += kThreads) visit(cell);
  }
}

// Lanes: which columns a lane's sums are of.
template <class Lanes, int kTokens, int kWidth, int kBlockWarps>
static __device__ __forceinline__ void StoreWarpSums(const float (&sums)[kTokens][kWidth],
                                                     WarpSums<kTokens, kWidth, kBlockWarps>& shared) {
  using Cells = WarpSums<kTokens, kWidth, kBlockWarps>;
  const int lane = threadIdx.x % kWarp;
  float* cells = shared.cells[threadIdx.x / kWarp];
#pragma unroll
  for (int t = 0; t < kTokens; ++t)
#pragma unroll
    for (int i = 0; i < kWidth; i += Lanes::kRun) {
      float* place = cells + Cells::Place(t * kWarp * kWidth + Lanes::Column(lane, i));
      if constexpr (Lanes::kRun == 4) {
        *reinterpret_cast<float4*>(place) = make_float4(sums[t][i], sums[t][i + 1], sums[t][i + 2], sums[t][i + 3]);
      } else {
#pragma unroll
        for (int j = 0; j < Lanes::kRun; ++j) place[j] = sums[t][i + j];
      }
    }
}

template <int kTokens, int kWidth, int kBlockWarps>
static __device__ __forceinline__ float BlockSum(const WarpSums<kTokens, kWidth, kBlockWarps>& shared, unsigned cell) {
  const unsigned place = WarpSums<kTokens, kWidth, kBlockWarps>::Place(cell);
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kBlockWarps; ++w) sum += shared.cells[w][place];
  return sum;
}

// Add the blocks in global memory: the last of them to arrive adds what all have left in `partial`, [tiles, slices,
// blocks, cells]. `arrived`, [tiles, slices], was zero before the kernel.
template <class Lanes, int kTokens, int kWidth, int kBlockWarps>
static __device__ __forceinline__ void AddBlocksInMemory(const float (&sums)[kTokens][kWidth],
                                                         WarpSums<kTokens, kWidth, kBlockWarps>& shared,
                                                         float* all_partial, unsigned* arrived, const Totals& totals) {
  constexpr int kSlice = kWarp * kWidth;
  constexpr unsigned kCells = kTokens * kSlice, kThreads = kBlockWarps * kWarp;
  __shared__ bool last;
  StoreWarpSums<Lanes>(sums, shared);
  __syncthreads();
  const size_t place = static_cast<size_t>(blockIdx.z) * gridDim.y + blockIdx.y;
  float* partial = all_partial + place * gridDim.x * kCells;
  ForCells<kCells, kThreads>(kCells, [&](unsigned cell) {
    partial[static_cast<size_t>(blockIdx.x) * kCells + cell] = BlockSum(shared, cell);
  });
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(&arrived[place], 1u) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  ForCells<kCells, kThreads>(kCells, [&](unsigned cell) {
    const Totals::Cell<kTokens, kSlice> at(totals, cell);
    const Totals::Ahead ahead = totals.Read(at);
    float sum = ahead.first;
#pragma unroll 8
    for (int block = 0; block < gridDim.x; ++block) {
      sum += __ldcg(partial + static_cast<size_t>(block) * kCells + cell);
    }
    totals.Store(at, sum, ahead);
  });
}

#if TDA_CLUSTERS

// The number of zero bits ahead of the first one, at compile time.
static __device__ constexpr unsigned Zeros(unsigned number) { return number >> 31 ? 0 : 1 + Zeros(number << 1 | 1); }

// Where the sums of the cluster's blocks meet. The first of them, a power of two, add equal parts of the cells, whole warps
// of them.
template <int kTokens, int kWidth>
struct ClusterSums {
  static constexpr unsigned kCells = kTokens * kWarp * kWidth;
  static constexpr unsigned kWarps = kCells / kWarp;
  static_assert((kWarps & (kWarps - 1)) == 0, "parts are equal");

  // A part has 2^Shift() cells.
  static __device__ __forceinline__ unsigned Shift() {
    constexpr unsigned kAll = 31 - Zeros(kCells), kMostParts = 31 - Zeros(kWarps);
    return kAll - min(31u - static_cast<unsigned>(__clz(gridDim.x)), kMostParts);
  }

  // [ranks, cells of a part]. One rank less than the most has the most to receive, but for parts of a warp.
  static constexpr unsigned kMostReceived = (kMostRanks - 1) * kCells / (kMostRanks / 2), kOfWarps = kMostRanks * kWarp;
  float received[kMostReceived > kOfWarps ? kMostReceived : kOfWarps];
  ClusterInbox inbox;

  static __device__ __forceinline__ unsigned OwnCells() { return 1u << Shift(); }

  // Called when the block begins. A block alone sends nothing: compute-sanitizer refuses that in a cluster of one.
  __device__ __forceinline__ void Begin() {
    if (gridDim.x == 1) return;
    inbox.Begin(blockIdx.x * OwnCells() < kCells ? OwnCells() * gridDim.x : 0);
  }

  // Send the block's sum of a cell to the block that adds it.
  __device__ __forceinline__ void Send(unsigned cell, float sum) {
    const unsigned shift = Shift(), own = cell & ((1u << shift) - 1);
    const float sums[1] = {sum};
    inbox.Send(&received[(blockIdx.x << shift) + own], cell >> shift, sums);
  }
};

// Add the blocks along the grid's x, which are one cluster. cluster_sums.Begin() was called when the block began.
template <class Lanes, int kTokens, int kWidth, int kBlockWarps>
static __device__ __forceinline__ void AddBlocksInCluster(const float (&sums)[kTokens][kWidth],
                                                          WarpSums<kTokens, kWidth, kBlockWarps>& shared,
                                                          ClusterSums<kTokens, kWidth>& cluster_sums,
                                                          const Totals& totals) {
  using Cell = Totals::Cell<kTokens, kWarp * kWidth>;
  constexpr unsigned kCells = kTokens * kWarp * kWidth, kThreads = kBlockWarps * kWarp;
  const bool alone = gridDim.x == 1;
  const unsigned own_cells = cluster_sums.OwnCells(), first_cell = blockIdx.x * own_cells;
  const unsigned added_cells = first_cell < kCells ? own_cells : 0;
  // What is read of a thread's first cell does not wait for other blocks.
  Totals::Ahead ahead = {};
  if (threadIdx.x < added_cells) ahead = totals.Read(Cell(totals, first_cell + threadIdx.x));
  StoreWarpSums<Lanes>(sums, shared);
  __syncthreads();
  if (!alone) {
    cluster_sums.inbox.WaitForBlocks();
    ForCells<kCells, kThreads>(kCells, [&](unsigned cell) { cluster_sums.Send(cell, BlockSum(shared, cell)); });
    cluster_sums.inbox.WaitForFloats();
  }
  ForCells<kCells, kThreads>(added_cells, [&](unsigned own) {
    const Cell cell(totals, first_cell + own);
    if (kCells > kThreads && own >= kThreads) ahead = totals.Read(cell);
    float sum = ahead.first;
    if (alone) {
      sum += BlockSum(shared, own);
    } else {
      for (unsigned rank = 0; rank < gridDim.x; ++rank) sum += cluster_sums.received[rank * own_cells + own];
    }
    totals.Store(cell, sum, ahead);
  });
}

#endif
