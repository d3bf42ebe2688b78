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

template <int kTokens, int kWidth, int kBlockWarps>
static __device__ __forceinline__ void StoreWarpSums(const float (&sums)[kTokens][kWidth],
                                                     WarpSums<kTokens, kWidth, kBlockWarps>& shared) {
  using Cells = WarpSums<kTokens, kWidth, kBlockWarps>;
  constexpr int kStored = kWidth < 4 ? 1 : 4;
  const int lane = threadIdx.x % kWarp;
  float* cells = shared.cells[threadIdx.x / kWarp];
#pragma unroll
  for (int t = 0; t < kTokens; ++t)
#pragma unroll
    for (int i = 0; i < kWidth; i += kStored) {
      float* place = cells + Cells::Place((t * kWarp + lane) * kWidth + i);
      if constexpr (kStored == 1) {
        *place = sums[t][i];
      } else {
        *reinterpret_cast<float4*>(place) = make_float4(sums[t][i], sums[t][i + 1], sums[t][i + 2], sums[t][i + 3]);
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
template <int kTokens, int kWidth, int kBlockWarps>
static __device__ __forceinline__ void AddBlocksInMemory(const float (&sums)[kTokens][kWidth],
                                                         WarpSums<kTokens, kWidth, kBlockWarps>& shared,
                                                         float* all_partial, unsigned* arrived, const Totals& totals) {
  constexpr int kSlice = kWarp * kWidth;
  constexpr int kCells = kTokens * kSlice;
  __shared__ bool last;
  StoreWarpSums(sums, shared);
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

constexpr int kMostRanks = 16;  // blocks of a cluster

// Tell the cluster's other blocks that this one runs, or has written what it writes to their memory.
static __device__ __forceinline__ void ArriveAtCluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

static __device__ __forceinline__ void WaitForCluster() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Store to shared memory of another block of the cluster, at the same address as here.
static __device__ __forceinline__ void StoreAtRank(float* address, int rank, float value) {
  unsigned own = static_cast<unsigned>(__cvta_generic_to_shared(address)), there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(own), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(value) : "memory");
}

// Add the blocks through each other's shared memory; the blocks along the grid's x are one cluster. Each adds a part of
// the cells. ArriveAtCluster was called when the block began.
template <int kTokens, int kWidth, int kBlockWarps>
static __device__ __forceinline__ void AddBlocksInCluster(const float (&sums)[kTokens][kWidth],
                                                          WarpSums<kTokens, kWidth, kBlockWarps>& shared,
                                                          const Totals& totals) {
  constexpr int kSlice = kWarp * kWidth;
  constexpr int kCells = kTokens * kSlice;
  __shared__ float received[kCells + kMostRanks * kWarp];  // [ranks, cells of a rank]
  const int ranks = gridDim.x;
  const int own_cells = (kCells + ranks - 1) / ranks;
  StoreWarpSums(sums, shared);
  __syncthreads();
  WaitForCluster();  // all blocks run, so that their memory is there
  for (int cell = threadIdx.x; cell < kCells; cell += kBlockWarps * kWarp) {
    const int rank = cell / own_cells;
    StoreAtRank(&received[blockIdx.x * own_cells + cell - rank * own_cells], rank, BlockSum(shared, cell));
  }
  ArriveAtCluster();
  WaitForCluster();
  for (int own = threadIdx.x; own < own_cells; own += kBlockWarps * kWarp) {
    const int cell = blockIdx.x * own_cells + own;
    if (cell >= kCells || !totals.Wanted<kSlice>(cell)) continue;
    float sum = totals.First<kSlice>(cell);
    for (int rank = 0; rank < ranks; ++rank) sum += received[rank * own_cells + own];
    totals.Store<kSlice>(cell, sum);
  }
}

#endif

