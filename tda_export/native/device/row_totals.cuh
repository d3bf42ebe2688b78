// From the sums of each warp to the result: warps of a block are added in shared memory, then the blocks that share a
// slice of columns (those along the grid's x), always in the same order.

// A cell is a token's sum of a column. The sums of a lane are neighbours, so four of them are stored at once; they are
// turned by their lane, so that lanes meet different banks.
template <int kTokens, int kWidth, int kBlockWarps>
struct WarpSums {
  static constexpr int kFours = kWidth / 4;  // 0: one column a lane

  static __device__ __forceinline__ int Place(int cell) {
    if constexpr (kFours == 0) {
      return cell;
    } else {
      const int lane = cell / kWidth, four = cell % kWidth / 4;
      return lane * kWidth + (four + lane * kWidth / kWarp) % kFours * 4 + cell % 4;
    }
  }

  alignas(16) float cells[kBlockWarps][kTokens * kWarp * kWidth];
};

// Where the totals of a slice (blockIdx.y) and a tile of tokens (blockIdx.z) go.
struct Totals {
  const Element* bias;  // [columns] or null
  Element* y;           // [tokens, columns], from the tile's first token on
  int columns, tokens;  // tokens of this tile

  template <int kSlice>
  __device__ __forceinline__ bool Wanted(int cell) const {
    return cell / kSlice < tokens && blockIdx.y * kSlice + cell % kSlice < columns;
  }

  // What a cell's sum begins with.
  template <int kSlice>
  __device__ __forceinline__ float First(int cell) const {
    return bias == nullptr ? 0.0f : ToFloat(bias[blockIdx.y * kSlice + cell % kSlice]);
  }

  template <int kSlice>
  __device__ __forceinline__ void Store(int cell, float total) const {
    y[static_cast<size_t>(cell / kSlice) * columns + blockIdx.y * kSlice + cell % kSlice] = FromFloat(total);
  }
};

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
static __device__ __forceinline__ float BlockSum(const WarpSums<kTokens, kWidth, kBlockWarps>& shared, int cell) {
  const int place = WarpSums<kTokens, kWidth, kBlockWarps>::Place(cell);
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
  constexpr int kCells = kTokens * kSlice;
  __shared__ bool last;
  StoreWarpSums<Lanes>(sums, shared);
  __syncthreads();
  const size_t place = static_cast<size_t>(blockIdx.z) * gridDim.y + blockIdx.y;
  float* partial = all_partial + place * gridDim.x * kCells;
  for (int cell = threadIdx.x; cell < kCells; cell += kBlockWarps * kWarp) {
    partial[static_cast<size_t>(blockIdx.x) * kCells + cell] = BlockSum(shared, cell);
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(&arrived[place], 1u) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  for (int cell = threadIdx.x; cell < kCells; cell += kBlockWarps * kWarp) {
    if (!totals.Wanted<kSlice>(cell)) continue;
    float sum = totals.First<kSlice>(cell);
#pragma unroll 8
    for (int block = 0; block < gridDim.x; ++block) {
      sum += __ldcg(partial + static_cast<size_t>(block) * kCells + cell);
    }
    totals.Store<kSlice>(cell, sum);
  }
}

#if TDA_CLUSTERS

// Where the sums of the cluster's blocks meet: each adds a part of the cells.
template <int kTokens, int kWidth>
struct ClusterSums {
  static constexpr int kCells = kTokens * kWarp * kWidth;

  float received[kCells + kMostRanks * kWarp];  // [ranks, cells of a rank]
  ClusterInbox inbox;

  __device__ __forceinline__ int OwnCells() const { return (kCells + gridDim.x - 1) / gridDim.x; }

  // Called when the block begins. A block alone sends nothing: compute-sanitizer refuses that in a cluster of one.
  __device__ __forceinline__ void Begin() {
    if (gridDim.x == 1) return;
    const int cells = min(OwnCells(), kCells - static_cast<int>(blockIdx.x) * OwnCells());
    inbox.Begin(max(cells, 0) * static_cast<int>(gridDim.x));
  }

  // Send the block's sum of a cell to the block that adds it.
  __device__ __forceinline__ void Send(int cell, float sum) {
    const int own_cells = OwnCells(), rank = cell / own_cells;
    const float sums[1] = {sum};
    inbox.Send(&received[blockIdx.x * own_cells + cell - rank * own_cells], rank, sums);
  }
};

// Add the blocks along the grid's x, which are one cluster. cluster_sums.Begin() was called when the block began.
template <class Lanes, int kTokens, int kWidth, int kBlockWarps>
static __device__ __forceinline__ void AddBlocksInCluster(const float (&sums)[kTokens][kWidth],
                                                          WarpSums<kTokens, kWidth, kBlockWarps>& shared,
                                                          ClusterSums<kTokens, kWidth>& cluster_sums,
                                                          const Totals& totals) {
  constexpr int kSlice = kWarp * kWidth;
  constexpr int kCells = kTokens * kSlice;
  StoreWarpSums<Lanes>(sums, shared);
  __syncthreads();
  const bool alone = gridDim.x == 1;
  if (!alone) {
    cluster_sums.inbox.WaitForBlocks();
    for (int cell = threadIdx.x; cell < kCells; cell += kBlockWarps * kWarp) {
      cluster_sums.Send(cell, BlockSum(shared, cell));
    }
    cluster_sums.inbox.WaitForFloats();
  }
  const int own_cells = cluster_sums.OwnCells();
  for (int own = threadIdx.x; own < own_cells; own += kBlockWarps * kWarp) {
    const int cell = blockIdx.x * own_cells + own;
    if (cell >= kCells || !totals.Wanted<kSlice>(cell)) continue;
    float sum = totals.First<kSlice>(cell);
    if (alone) {
      sum += BlockSum(shared, cell);
    } else {
      for (int rank = 0; rank < gridDim.x; ++rank) sum += cluster_sums.received[rank * own_cells + own];
    }
    totals.Store<kSlice>(cell, sum);
  }
}

#endif

