// One kernel for a chain of products of one token, whose blocks stay from product to product: what layer_kernel.cu times.
// It stands behind layer_shares.cuh and device/row_linear.cu, of whose code it is made.
//
// A unit is 16 neighbouring rows of a slice of 256 columns. The units of a product, slice after slice, are dealt in
// equal runs: first to blocks, then to the warps of a block. So bytes are balanced to a unit of a warp whether or not
// slices divide the blocks; in return a block's run may go on into a second slice, and one of its warps may be in both.
//
// Blocks that share a slice store partial sums in float32. A product is `gathered` where the last of these blocks to
// arrive adds them up and stores y; otherwise each block of the next product adds those of its own rows. Both add in the
// order of blocks, so results do not change from run to run.
//
// A warp's matrices, 16 rows each, come through a ring in shared memory, and the ring runs on across products: as soon as
// a place is free, the warp's first matrices of the next product start, before their x is known.

constexpr int kGroupsTogether = 12;   // partial sums of a row that are read at once
constexpr long long kMostCycles = 2000000000;  // of a wait; a second, and no wait should take a millisecond

template <int kSlots, int kMostUnits>
struct LayerWarp {
  WarpRows<1, CodeMatrixFormat<4, kSlots>> rows;  // its list is too short, and stays unused
  union {
    struct {
      unsigned short rows[kMostUnits * kChunk];
      unsigned short values[kMostUnits * kChunk];
    } list;
    alignas(16) float sums[kSliceColumns];
  };
};

template <int kBlockWarps, int kSlots, int kMostUnits>
struct LayerKernel {
  using Format = CodeMatrixFormat<4, kSlots>;
  using Reader = MatrixSums<Format>;
  using Warp = LayerWarp<kSlots, kMostUnits>;
  using Cells = WarpSums<1, Format::kWidth, kBlockWarps>;
  using Sums = float[1][Format::kWidth];
  static constexpr int kThreads = kBlockWarps * kWarp;
  static constexpr int kLooks = kMostUnits * kChunk / kWarp;  // candidates of a lane
  static constexpr int kRowsTogether = 2;                     // of these, whose partial sums are read at once
  static_assert(kLooks * kWarp == kMostUnits * kChunk && kLooks % kRowsTogether == 0, "whole looks");

  struct Shared {
    Warp warps[kBlockWarps];
    alignas(16) float cut_sums[kSliceColumns];  // of the warp that is in both slices, those of the first
    int slices_done;
  };

  // Which matrix of the warp starts next.
  struct Next {
    int product = 0, matrix = 0, slot = 0;
    WarpShare share;
    int early;
  };

  const LayerArguments& a;
  Shared& shared;
  Warp& own;
  const int warp, lane;
  const bool may_drop;
  Next next;
  // Of the product whose x is known.
  int known = -1, matrices = 0, cut_matrix = 0;
  int under_way = 0, slot = 0;  // of the matrix that is added next
  unsigned arrivals = 0;        // to wait for
  // Of the product that is added.
  BlockShare block;
  WarpShare share;

  __device__ __forceinline__ LayerKernel(const LayerArguments& a, Shared& shared)
      : a(a),
        shared(shared),
        own(shared.warps[threadIdx.x / kWarp]),
        warp(threadIdx.x / kWarp),
        lane(threadIdx.x % kWarp),
        may_drop(*a.price > 0.0f) {
    SetShare();
  }

  __device__ __forceinline__ WarpShare ShareOf(const LayerProduct& product) const {
    return WarpShare::Of<kBlockWarps>(BlockShare::Of(product), warp);
  }
  __device__ __forceinline__ int EarlyOf(int units) const {
    return a.early == 0 ? 0 : may_drop ? min(a.early, units) : units;
  }
  __device__ __forceinline__ void SetShare() {
    next.share = ShareOf(a.products[next.product]);
    next.early = EarlyOf(next.share.units);
  }

  // Start the next matrix if it is known which rows it has. One group of copies is committed in any case.
  __device__ __forceinline__ void StartNext() {
    while (next.product < a.count) {
      const bool is_known = next.product <= known;
      if (next.matrix < (is_known ? matrices : next.early)) break;
      if (!is_known && next.early < next.share.units) break;
      next.matrix = 0;
      if (++next.product < a.count) SetShare();
    }
    const bool is_known = next.product <= known;
    if (next.product == a.count || next.matrix >= (is_known ? matrices : next.early)) {
      CommitCopies();
      return;
    }
    const int matrix = next.matrix++;
    const bool listed = matrix >= next.early;
    const int slice = next.share.slice + (matrix >= (listed ? cut_matrix : next.share.cut));
    const auto column = Format(a.products[next.product].weight).From(slice * kSliceColumns);
    Sums none;
    const Reader reader = {column, none};
    const int first = next.share.Row(matrix);
    const unsigned short* rows = own.list.rows + matrix * kChunk;
    reader.Start(own.rows.room.slots[next.slot], [&](int r) { return listed ? static_cast<int>(rows[r]) : first + r; });
    next.slot = next.slot + 1 == kSlots ? 0 : next.slot + 1;
    ++under_way;
  }

  __device__ __forceinline__ void Wait() const {
    if (threadIdx.x == 0) {
      const long long begin = Cycles();
      while (static_cast<int>(ReadAcquired(a.passed) - arrivals) < 0) {
        if (Cycles() - begin > kMostCycles) asm volatile("trap;");
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ void Stamp(int product, int i) const {
    if (a.stamps != nullptr && threadIdx.x == 0) {
      a.stamps[(product * kLayerStamps + i) * gridDim.x + blockIdx.x] = Nanoseconds();
    }
  }

  // Of a row as x: y of the product before, from sums of its groups.
  __device__ __forceinline__ void ReadX(int p, const int (&rows)[kLooks], const int (&groups)[kLooks], int units,
                                        float (&x)[kLooks]) const {
    const LayerProduct& before = a.products[max(p - 1, 0)];
    if (p == 0 || before.gathered) {
      const Element* stored = p == 0 ? a.x : a.gathered + (p - 1) % 2 * a.gathered_size;
#pragma unroll
      for (int j = 0; j < kLooks; ++j) {
        if (rows[j] >= 0) x[j] = ToFloat(static_cast<Element>(__ldcg(stored + rows[j])));
      }
      return;
    }
    const float* partial = a.partial + (p - 1) % 2 * a.partial_size;
#pragma unroll
    for (int first = 0; first < kLooks; first += kRowsTogether) {
      if (first * kWarp >= units * kChunk) break;
#pragma unroll 1
      for (int g = 0; g < before.most_groups; g += kGroupsTogether) {
        float parts[kRowsTogether][kGroupsTogether];
#pragma unroll
        for (int j = 0; j < kRowsTogether; ++j)
#pragma unroll
          for (int i = 0; i < kGroupsTogether; ++i) {
            parts[j][i] = 0.0f;
            if (g + i < groups[first + j]) parts[j][i] = __ldcg(partial + (g + i) * before.outputs + rows[first + j]);
          }
#pragma unroll
        for (int j = 0; j < kRowsTogether; ++j)
#pragma unroll
          for (int i = 0; i < kGroupsTogether; ++i) x[first + j] += parts[j][i];
      }
#pragma unroll
      for (int j = first; j < first + kRowsTogether; ++j) x[j] = ToFloat(FromFloat(x[j]));
    }
  }

  // Wait for x, and list what the warp multiplies its matrices with: of early ones every row in its place, then the
  // needed rows of the others, those of each slice filled up to whole matrices.
  __device__ __forceinline__ void List(int p) {
    const LayerProduct& product = a.products[p];
    block = BlockShare::Of(product);
    share = WarpShare::Of<kBlockWarps>(block, warp);
    const int early = EarlyOf(share.units);
    int rows[kLooks], groups[kLooks];
    float row_price[kLooks], x[kLooks];
#pragma unroll
    for (int j = 0; j < kLooks; ++j) {
      const int k = j * kWarp + lane;
      const bool there = k < share.units * kChunk;
      rows[j] = there ? share.Row(k / kChunk) + k % kChunk : -1;
      row_price[j] = there && may_drop ? __ldg(product.row_price + rows[j]) : 0.0f;
      groups[j] = there && p > 0 ? __ldg(a.products[p - 1].groups + rows[j] / kSliceColumns) : 0;
      x[j] = 0.0f;
    }
    if (p > 0) Wait();
    Stamp(p, 0);
    ReadX(p, rows, groups, share.units, x);
    const unsigned lanes_before = (1u << lane) - 1;
    const float price = *a.price;
    int places[2] = {early * kChunk, early * kChunk};  // where the list of each slice ends
    const auto put = [&](int at, int row, float value) {
      own.list.rows[at] = static_cast<unsigned short>(row);
      own.list.values[at] = static_cast<unsigned short>(ToHalves(value, 0.0f));
    };
    const auto whole = [](int count) { return (count + kChunk - 1) / kChunk * kChunk; };
#pragma unroll
    for (int j = 0; j < kLooks; ++j) {
      if (j * kWarp >= share.units * kChunk) break;
      const int unit = (j * kWarp + lane) / kChunk;
      // Less, not its opposite: NaN is kept.
      const bool dropped = may_drop && __fmul_rn(__fmul_rn(x[j], x[j]), row_price[j]) < price;
      const float value = dropped ? 0.0f : x[j];
      if (unit < early) put(j * kWarp + lane, rows[j], value);
      const bool listed = rows[j] >= 0 && unit >= early && value != 0.0f;
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const bool here = listed && (unit >= share.cut) == (s == 1);
        const unsigned all = __ballot_sync(0xffffffffu, here);
        if (s == 1 && places[1] < whole(places[0])) places[1] = whole(places[0]);
        if (here) put(places[s] + __popc(all & lanes_before), rows[j], value);
        places[s] += __popc(all);
      }
    }
    places[1] = max(places[1], whole(places[0]));
    __syncwarp();
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const int end = places[s], filled = whole(end);
      if (end + lane < filled) put(end + lane, own.list.rows[end - 1], 0.0f);
    }
    __syncwarp();
    known = p;
    matrices = whole(places[1]) / kChunk;
    cut_matrix = share.units == share.cut ? matrices : share.cut < early ? share.cut : whole(places[0]) / kChunk;
    Stamp(p, 1);
    for (int i = under_way; i < kSlots; ++i) StartNext();
  }

  // The exponent of a power of two for the values.
  __device__ __forceinline__ unsigned PowerOfList() const {
    constexpr unsigned kMagnitude = 0x7fff;
    unsigned largest = 0;
    for (int i = lane; i < matrices * kChunk; i += kWarp) {
      largest = max(largest, static_cast<unsigned>(own.list.values[i]) & kMagnitude);
    }
    return Reader::PowerOf(__reduce_max_sync(0xffffffffu, largest));
  }

  __device__ __forceinline__ void StoreSums(const Sums& sums, float* cells) const {
    static_assert(Format::Lanes::kRun == 4, "four sums of a lane are neighbours");
#pragma unroll
    for (int i = 0; i < Format::kWidth; i += 4) {
      *reinterpret_cast<float4*>(cells + Cells::Place(Format::Lanes::Column(lane, i))) =
          make_float4(sums[0][i], sums[0][i + 1], sums[0][i + 2], sums[0][i + 3]);
    }
  }

  // Add the warp's matrices, and leave their sums in shared memory.
  __device__ __forceinline__ void Add(int p) {
    const unsigned power = PowerOfList();
    const float full = Reader::FullCode(power);
    const bool in_both = share.cut < share.units;
    const auto column = Format(a.products[p].weight).From(0);
#pragma unroll 1
    for (int part = 0, matrix = 0; part < 1 + in_both; ++part) {
      Sums sums = {};
      const Reader reader = {column, sums};
      float products[Reader::kRun][4] = {}, zero_products[4] = {};
      const int end = part == 0 ? cut_matrix : matrices;
#pragma unroll 1
      for (; matrix < end; ++matrix) {
        WaitForCopies<kSlots - 1>();
        __syncwarp();
        reader.AddMatrix(own.rows.room.slots[slot], own.list.values + matrix * kChunk, power << Reader::kFraction,
                         products, zero_products);
        __syncwarp();
        slot = slot + 1 == kSlots ? 0 : slot + 1;
        --under_way;
        StartNext();
      }
      reader.Finish(products, zero_products, full);
      __syncwarp();  // the list gives way to sums
      StoreSums(sums, in_both && part == 0 ? shared.cut_sums : own.sums);
    }
  }

  // Return the block's sum of a column of its first or second slice.
  __device__ __forceinline__ float BlockSum(int segment, int column) const {
    const int place = Cells::Place(column);
    float sum = 0.0f;
    bool cut_warp = false;
#pragma unroll
    for (int w = 0; w < kBlockWarps; ++w) {
      const int begin = block.template Before<kBlockWarps>(w), end = block.template Before<kBlockWarps>(w + 1);
      cut_warp = cut_warp || (begin < block.cut && block.cut < end);
      if ((end > block.cut) == (segment == 1)) sum += shared.warps[w].sums[place];
    }
    return segment == 0 && cut_warp ? sum + shared.cut_sums[place] : sum;
  }

  // Store the block's sums, and where it is the last of a gathered slice, that slice of y.
  __device__ __forceinline__ void Store(int p) {
    const LayerProduct& product = a.products[p];
    const int segments = 1 + (block.cut < block.units);
    float* partial = a.partial + p % 2 * a.partial_size;
    for (int cell = threadIdx.x; cell < segments * kSliceColumns; cell += kThreads) {
      const int segment = cell / kSliceColumns;
      partial[(segment == 0 ? block.group : 0) * product.outputs + block.slice * kSliceColumns + cell] =
          BlockSum(segment, cell % kSliceColumns);
    }
    __syncthreads();
    if (!product.gathered) {
      if (threadIdx.x == 0) AddReleased(a.passed, 1);
      arrivals += gridDim.x;
    } else {
      arrivals += product.outputs / kSliceColumns;
      if (threadIdx.x == 0) {
        int done = 0;
        for (int s = 0; s < segments; ++s) {
          unsigned* arrived = product.arrived + block.slice + s;
          if (AddOneReleased(arrived) + 1 == product.groups[block.slice + s]) {
            *arrived = 0;
            done |= 1 << s;
          }
        }
        shared.slices_done = done;
      }
      __syncthreads();
      const int done = shared.slices_done;
      if (done != 0) Gather(p, product, done, partial);
    }
    Stamp(p, 3);
  }

  __device__ __forceinline__ void Gather(int p, const LayerProduct& product, int done, const float* partial) const {
    Element* y = p == a.count - 1 ? a.y : a.gathered + p % 2 * a.gathered_size;
    for (int cell = threadIdx.x; cell < 2 * kSliceColumns; cell += kThreads) {
      if ((done >> cell / kSliceColumns & 1) == 0) continue;
      const int column = block.slice * kSliceColumns + cell, groups = product.groups[column / kSliceColumns];
      float sum = 0.0f;
#pragma unroll 8
      for (int g = 0; g < groups; ++g) sum += __ldcg(partial + g * product.outputs + column);
      y[column] = FromFloat(sum);
    }
    __syncthreads();
    if (threadIdx.x == 0) AddReleased(a.passed, __popc(done));
  }

  __device__ __forceinline__ void Run() {
    for (int i = 0; i < kSlots; ++i) StartNext();
#pragma unroll 1
    for (int p = 0; p < a.count; ++p) {
      List(p);
      Add(p);
      Stamp(p, 2);
      __syncthreads();
      Store(p);
    }
    if (threadIdx.x == 0 && AddOneReleased(a.passed + 1) + 1 == gridDim.x) a.passed[0] = a.passed[1] = 0;
  }
};

#define TDA_LAYER_KERNEL(warps, blocks, slots, units)                             \
  extern "C" __global__ void __launch_bounds__(warps* kWarp, blocks)              \
      Layer_##warps##_##blocks(const __grid_constant__ LayerArguments arguments) { \
    using Kernel = LayerKernel<warps, slots, units>;                              \
    Kernel(arguments, BlockMemory<Kernel::Shared, true>()).Run();                 \
  }
