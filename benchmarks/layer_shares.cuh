// What the kernel of layer_kernel.cuh is told, its grid's barrier, and who has which units. It stands behind
// device/row_linear.cu, and layer_kernel.cuh behind it.

constexpr int kChunk = 16;            // rows of a unit
constexpr int kSliceColumns = 256;
constexpr int kMostProducts = 48;     // kernel parameters hold so many
constexpr int kLayerStamps = 4;       // the wait has ended, x is known, rows are added, sums are stored

struct LayerProduct {
  StoredMatrix weight;          // [inputs, outputs], int4
  const float* row_price;       // [inputs]
  const unsigned char* groups;  // [slices]: blocks that share each
  unsigned* arrived;            // [slices]: of a gathered product, blocks that are done; 0 before and after the kernel
  int inputs, outputs;
  int most_groups;
  int gathered;
};

struct LayerArguments {
  const Element* x;           // [inputs of the first product]
  const float* price;         // [1]
  float* partial;             // [2, partial_size]: of a product [groups, outputs]
  Element* gathered;          // [2, gathered_size]: its y
  Element* y;                 // [outputs of the last product], which is gathered
  unsigned* passed;           // [2]: arrivals at the grid's barrier, and blocks that have ended; 0 before and after
  unsigned long long* stamps;  // [products, kLayerStamps, blocks] in nanoseconds, or null
  int count, partial_size, gathered_size;
  // Matrices of a warp that are read before x is known where x may drop their rows; 0: none, nor where it drops nothing.
  int early;
  LayerProduct products[kMostProducts];
};

static __device__ __forceinline__ unsigned ReadAcquired(const unsigned* place) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(place) : "memory");
  return value;
}

static __device__ __forceinline__ void AddReleased(unsigned* place, unsigned value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(place), "r"(value) : "memory");
}

static __device__ __forceinline__ unsigned AddOneReleased(unsigned* place) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(place) : "memory");
  return before;
}

static __device__ __forceinline__ long long Cycles() {
  long long now;
  asm volatile("mov.u64 %0, %clock64;" : "=l"(now));
  return now;
}

static __device__ __forceinline__ unsigned long long Nanoseconds() {
  unsigned long long now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

// The units of a block, and of one of its warps.
struct BlockShare {
  int chunks;  // units of a slice
  int first, units;
  int slice, cut;  // the slice it begins in, and how many units are in that
  int group;       // its place among the blocks that share this slice

  static __device__ __forceinline__ BlockShare Of(const LayerProduct& product) {
    const unsigned block = blockIdx.x, blocks = gridDim.x;
    const int chunks = product.inputs / kChunk;
    const unsigned all = chunks * (product.outputs / kSliceColumns);
    const int first = all * block / blocks, units = all * (block + 1) / blocks - first, slice = first / chunks;
    const int group = block - ((slice * chunks + 1) * blocks - 1) / all;
    return {chunks, first, units, slice, min(units, (slice + 1) * chunks - first), group};
  }

  // Return how many units the warps before this one have.
  template <int kBlockWarps>
  __device__ __forceinline__ int Before(int warp) const {
    return units * warp / kBlockWarps;
  }
};

struct WarpShare {
  int slice, chunk, units, cut;  // where it begins, and how many of its units are in that slice

  template <int kBlockWarps>
  static __device__ __forceinline__ WarpShare Of(const BlockShare& block, int warp) {
    const int before = block.Before<kBlockWarps>(warp), units = block.Before<kBlockWarps>(warp + 1) - before;
    const bool second = before >= block.cut;
    const int chunk = second ? before - block.cut : block.first + before - block.slice * block.chunks;
    return {block.slice + second, chunk, units, min(units, block.chunks - chunk)};
  }

  __device__ __forceinline__ int Row(int unit) const { return (unit < cut ? chunk + unit : unit - cut) * kChunk; }
};
