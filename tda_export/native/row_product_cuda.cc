#include "row_product_cuda.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>
#include <utility>

#include "whole_slices.h"

namespace tda {
namespace {

constexpr int64_t kMostRanks = 16;  // blocks of a cluster
constexpr int64_t kMatrixRows = 16;  // rows that a warp adds at once by matrices
constexpr int kFirstWithMatrices = 80;  // compute capability
constexpr int64_t kLargeWarps = 16;
constexpr double kNearlyAsBusy = 0.95;
constexpr int64_t kStaticBytes = 4096;  // at most, of a kernel's shared memory beside what is asked for

// Dynamic shared memory of a warp that has so many matrices under way (device/row_sums_matrices.cuh).
constexpr int64_t MatrixBytes(int bits, int matrices) { return matrices * MatrixRowsBytes(bits) + 768; }

// A kernel for one token or a tile of them, and how many blocks can share the rows of a slice of columns. That decides in
// which order rows are added, so it is the same number whatever x is: that of the kernel that finds x stored.
struct SharedKernel {
  CudaKernel kernel;
  int64_t width;  // columns of a thread
  int64_t warps;
  int64_t rows;           // that a warp adds at once
  int resident_blocks = 0;
  int resident_clusters[kMostRanks + 1] = {};  // by blocks of a cluster

  int64_t Slice() const { return kWarp * width; }

  // As many blocks as run at once when there are so many sums of slices, but none without rows for each of its warps.
  int64_t Ranks(int64_t sums, int64_t inputs, bool clusters) const {
    const int64_t most = std::max<int64_t>(1, CeilDivide(inputs, warps * rows));
    if (!clusters) return std::clamp<int64_t>(resident_blocks / sums, 1, most);
    int64_t ranks = std::min(most, kMostRanks);
    // Kernels by matrices, whose warps take sixteen rows, lose more by sharing than by empty places (measured on an H200).
    if (rows < kMatrixRows && resident_clusters[1] < sums) return RanksOfRounds(sums, ranks);
    while (ranks > 1 && resident_clusters[ranks] < sums) --ranks;
    return ranks;
  }

  // Where not all sums run at once: the fewest blocks that share a sum with which the places for blocks are nearly as busy,
  // on average over all rounds, as with any number of them. The last round would leave many empty.
  int64_t RanksOfRounds(int64_t sums, int64_t most) const {
    const auto busy = [&](int64_t ranks) {
      const int64_t at_once = resident_clusters[ranks];
      return at_once == 0 ? 0.0 : static_cast<double>(sums * ranks) / (CeilDivide(sums, at_once) * resident_clusters[1]);
    };
    double best = 0;
    for (int64_t ranks = 1; ranks <= most; ++ranks) best = std::max(best, busy(ranks));
    int64_t ranks = 1;
    while (busy(ranks) < kNearlyAsBusy * best) ++ranks;
    return ranks;
  }
};

// The kernel of blocks that stay, for one token.
struct WholeKernel {
  CudaKernel kernel;
  WholeKernelLimits limits;
};

// Columns of a thread by matrices.
constexpr int64_t kMatrixWidth = 8;

// Whether codes lie as kernels by matrices need them: groups of 32 columns, and whole slices of them.
bool SuitsMatrices(const StoredMatrix& matrix, int64_t bits) {
  constexpr int kGroupShift = 5;
  const auto aligned = [](const void* address, uintptr_t bytes) {
    return reinterpret_cast<uintptr_t>(address) % bytes == 0;
  };
  return matrix.group_shift == kGroupShift && matrix.columns % (kWarp * kMatrixWidth) == 0 && aligned(matrix.weights, 16) &&
         aligned(matrix.scales, 16) && aligned(matrix.zero_points, static_cast<uintptr_t>(bits));
}

// Whether a node's price is a constant at which every row is read.
bool DropsNothing(const KernelInfo& info, size_t ahead, bool codes) {
  const Tensor constant = info.Constant(PriceInput(ahead, codes));
  if (!constant.present || constant.type != kFloat || constant.Count() != 1) return false;
  const CudaDriver& driver = CudaDriver::Get();
  float price = 0;
  const auto address = [](const void* data) { return reinterpret_cast<uintptr_t>(data); };
  driver.Check(driver.Memcpy(address(&price), address(constant.data), sizeof(price)), "read a price");
  return !(price > 0);
}

}  // namespace

// The kernels of one element type, bits of a code, and kind of inputs on one GPU.
class RowLinearKernels {
 public:
  RowLinearKernels(ElementType type, int bits, RowInputs inputs, const std::vector<std::string>& more_defines)
      : bits(bits == 0 ? 16 : bits),
        multiprocessors(CudaDevice::Current().multiprocessors),
        clusters(HasClusters(CudaDevice::Current().capability)) {
    const auto module_of = [&](RowInputs x, const std::vector<std::string>& more) {
      std::vector<std::string> defines = FormatDefines(type, bits);
      defines.push_back("TDA_CLUSTERS=" + std::to_string(clusters));
      defines.push_back("TDA_INPUTS=" + std::to_string(static_cast<int>(x)));
      defines.insert(defines.end(), more.begin(), more.end());
      return &CudaModule::Get("row_linear", defines);
    };
    const CudaModule* const stored = module_of(RowInputs::kStored, {});
    const CudaModule* const module = inputs == RowInputs::kStored ? stored : module_of(inputs, more_defines);
    // Fill in the clusters that a kernel can have, as the kernel that finds x stored has them. One that has no cluster of a
    // size cannot be launched so, however many the other one has.
    const auto count_clusters = [&](const CudaKernel& kernel, const CudaKernel& counted, unsigned threads,
                                    int(&resident_clusters)[kMostRanks + 1]) {
      for (unsigned ranks = 1; clusters && ranks <= kMostRanks; ++ranks) {
        const bool possible = module == stored || kernel.ResidentClusters(ranks, threads) > 0;
        resident_clusters[ranks] = possible ? counted.ResidentClusters(ranks, threads) : 0;
      }
    };
    // `matrices`: how many of them a warp has under way; 0: it adds row after row.
    auto shared = [&](int tokens, int64_t width, int64_t warps, int blocks, int matrices = 0) {
      std::string name = "RowLinear_" + std::to_string(tokens) + "_";
      name += matrices == 0 ? std::to_string(width) : warps == kLargeWarps ? "large" : "small";
      for (const int64_t part : {warps, int64_t{blocks}}) name += "_" + std::to_string(part);
      const unsigned threads = static_cast<unsigned>(warps * kWarp);
      const unsigned bytes = static_cast<unsigned>(matrices > 0 ? warps * MatrixBytes(bits, matrices) : 0);
      const CudaKernel counted = stored->Kernel(name.c_str(), threads, bytes);
      const CudaKernel kernel = module == stored ? counted : module->Kernel(name.c_str(), threads, bytes);
      SharedKernel made = {kernel, width, warps, matrices > 0 ? kMatrixRows : kRowsTogether, counted.resident_blocks};
      count_clusters(kernel, counted, threads, made.resident_clusters);
      return made;
    };
    // The fewer slices there are, the more warps share the rows of one, and larger blocks take fewer steps to add up.
    // The best choices were measured on an H100 and an H200, those from 24 slices on between 21.5, where both kernels of four
    // bits were as fast, and 56.
    if (bits == 4) {
      const SharedKernel wider = shared(1, 16, 8, 2), widest = shared(1, 32, 8, 2);
      wide = {{widest, 24}, {wider, 32}, {widest, 12}, {wider, 12}};
    } else {
      wide = {{shared(1, 8, 8, 3), CeilDivide(multiprocessors, 2)}, {shared(1, 8, 8, 2), CeilDivide(multiprocessors, 4)}};
    }
    wide.push_back({shared(1, 8, 16, 1), 0});
    narrow = shared(1, 1, 8, 3);
    if (inputs == RowInputs::kStored) {
      tile = shared(4, 8, 8, 1);
      narrow_tile = shared(4, 1, 8, 1);
    }
    const CudaDevice device = CudaDevice::Current();
    if (bits > 0 && type == kHalf && device.capability >= kFirstWithMatrices) {
      const int under_way = bits == 4 ? 2 : 1;
      matrices.push_back(shared(1, kMatrixWidth, 8, 3, under_way));
      if (kLargeWarps * MatrixBytes(bits, under_way + 1) + kStaticBytes <= device.shared_bytes) {
        matrices.push_back(shared(1, kMatrixWidth, kLargeWarps, 1, under_way + 1));
        if (clusters) {
          const unsigned threads = static_cast<unsigned>(kWholeWarps * kWarp);
          const unsigned bytes = static_cast<unsigned>(device.shared_bytes - kStaticBytes);
          const CudaKernel counted = stored->Kernel("RowLinear_1_whole_16_1", threads, bytes);
          whole = {module == stored ? counted : module->Kernel("RowLinear_1_whole_16_1", threads, bytes),
                   {bits, under_way, multiprocessors, bytes}};
          count_clusters(whole->kernel, counted, threads, whole->limits.resident_clusters);
        }
      }
    }
    if (!clusters) clear_counters = module->Kernel("ClearCounters", kThreads);
  }

  static const RowLinearKernels& Get(ElementType type, int bits, RowInputs inputs,
                                     const std::vector<std::string>& defines) {
    static std::mutex mutex;
    static std::map<std::tuple<int, int, int, RowInputs, std::vector<std::string>>, std::unique_ptr<RowLinearKernels>>
        made;
    const std::lock_guard<std::mutex> lock(mutex);
    std::unique_ptr<RowLinearKernels>& kernels = made[{CudaDevice::Current().device, type, bits, inputs, defines}];
    if (kernels == nullptr) kernels = std::make_unique<RowLinearKernels>(type, bits, inputs, defines);
    return *kernels;
  }

  // The part of the multiprocessors that have a large block, one each, on average over all rounds.
  double LargeBusy(const StoredMatrix& matrix, int64_t inputs) const {
    const SharedKernel& large = matrices.back();
    const int64_t slices = CeilDivide(matrix.columns, large.Slice());
    const int64_t blocks = slices * large.Ranks(slices, inputs, clusters);
    return static_cast<double>(blocks) / (CeilDivide(blocks, multiprocessors) * multiprocessors);
  }

  // Choose among kernels by matrices of which every block has one slice. Large ones win where at least 70 % are busy.
  const SharedKernel& ByMatrices(const StoredMatrix& matrix, int64_t inputs) const {
    return LargeBusy(matrix, inputs) >= 0.7 ? matrices.back() : matrices.front();
  }

  const SharedKernel& Choose(int64_t tokens, const StoredMatrix& matrix, int64_t inputs) const {
    if (!SuitsLoads(matrix, kWide, bits)) return tokens == 1 ? narrow : narrow_tile;
    if (tokens > 1) return tile;
    if (!matrices.empty() && SuitsMatrices(matrix, bits)) return ByMatrices(matrix, inputs);
    for (const auto& [kernel, least_slices] : wide) {
      const bool suits = SuitsLoads(matrix, kernel.width, bits);
      if (suits && CeilDivide(matrix.columns, kernel.Slice()) >= least_slices) return kernel;
    }
    return wide.back().first;
  }

  // How blocks that stay share a product of one token, if that pays.
  std::optional<WholeShares> WholeFor(int64_t tokens, const StoredMatrix& matrix, int64_t inputs) const {
    if (!whole || tokens > 1 || !SuitsMatrices(matrix, bits)) return std::nullopt;
    const WholeShares shares = ChooseWholeShares(matrix.columns / kWholeSlice, inputs, whole->limits);
    return shares.Pays(bits, LargeBusy(matrix, inputs)) ? std::optional(shares) : std::nullopt;
  }

  int64_t bits;  // of a column
  int64_t multiprocessors;
  bool clusters;
  std::vector<std::pair<SharedKernel, int64_t>> wide;  // of one token, each with the slices that it is worth it from
  std::vector<SharedKernel> matrices;                  // of one token, by matrices: one of small blocks first
  std::optional<WholeKernel> whole;                    // of one token, where there are clusters
  SharedKernel tile;                                   // of a tile of tokens
  SharedKernel narrow, narrow_tile;
  CudaKernel clear_counters;
};

RowProduct::RowProduct(const KernelInfo& info, ElementType type, int bits, size_t ahead, RowInputs inputs,
                       const std::vector<std::string>& defines)
    : allocator_(info),
      early_(info.Flag("early")),
      every_row_(DropsNothing(info, ahead, bits > 0)),
      many_tokens_(info, type, bits) {
  if (bits > 0) layout_.emplace(info, bits);
  stored_ = &RowLinearKernels::Get(type, bits, RowInputs::kStored, {});
  made_ = &RowLinearKernels::Get(type, bits, inputs, defines);
}

RowLinearCall RowProduct::Read(const KernelContext& context, const InputsAhead& ahead) const {
  return layout_ ? RowLinearCall(context, *layout_, ahead) : RowLinearCall(context, ahead);
}

StoredMatrix RowProduct::Matrix(const RowLinearCall& call) const {
  return layout_ ? StoredCodes(*layout_, call.weight, call.scales, call.zero_points) : StoredElements(call.weight);
}

void RowProduct::Multiply(const KernelContext& context, const RowLinearCall& call, const void* x,
                          const Addition& addition) const {
  if (call.y.Count() == 0) return;
  if (many_tokens_.Pays(call.tokens)) {
    many_tokens_.Multiply(context, {x, Matrix(call), false, call.tokens, call.inputs, call.outputs, call.y.data,
                                    call.row_price.As<const float>(), call.price.As<const float>(), call.bias.data,
                                    every_row_});
    if (addition.kernels != nullptr) addition.kernels->Add(context, call.tokens, call.outputs, addition, call.y.data);
    return;
  }
  RowLinearArguments arguments = {};
  arguments.x = x;
  arguments.residual = addition.residual;
  arguments.squares = addition.squares;
  Launch(context, call, *stored_, arguments);
}

void RowProduct::MultiplyMade(const KernelContext& context, const RowLinearCall& call,
                              const RowLinearArguments& made) const {
  Launch(context, call, *made_, made);
}

void RowProduct::Launch(const KernelContext& context, const RowLinearCall& call, const RowLinearKernels& kernels,
                        RowLinearArguments arguments) const {
  const StoredMatrix matrix = Matrix(call);
  arguments.weight = matrix;
  arguments.row_price = call.row_price.As<const float>();
  arguments.price = call.price.As<const float>();
  arguments.bias = call.bias.data;
  arguments.y = call.y.data;
  arguments.tokens = static_cast<int>(call.tokens);
  arguments.inputs = static_cast<int>(call.inputs);
  arguments.outputs = static_cast<int>(call.outputs);
  arguments.early = early_;
  void* stream = context.CudaStream();
  if (const std::optional<WholeShares> whole = kernels.WholeFor(call.tokens, matrix, call.inputs)) {
    CudaKernel kernel = kernels.whole->kernel;
    kernel.shared_bytes = static_cast<unsigned>(whole->shared_bytes);
    kernel.Launch(stream, whole->ranks, whole->clusters, 1, kWholeWarps * kWarp, &arguments, whole->ranks);
    return;
  }
  const SharedKernel& shared = kernels.Choose(call.tokens, matrix, call.inputs);
  const int64_t tile = call.tokens == 1 ? 1 : kTile;
  const int64_t tiles = CeilDivide(call.tokens, tile);
  const int64_t slices = CeilDivide(call.outputs, shared.Slice());
  const int64_t ranks = shared.Ranks(slices * tiles, call.inputs, kernels.clusters);
  const unsigned threads = static_cast<unsigned>(shared.warps * kWarp);
  if (kernels.clusters) {
    shared.kernel.Launch(stream, ranks, slices, tiles, threads, &arguments, static_cast<unsigned>(ranks));
    return;
  }
  const size_t partial_bytes = Aligned(tiles * slices * ranks * tile * shared.Slice() * sizeof(float));
  arguments.counters = static_cast<int>(tiles * slices);
  const Scratch scratch(context, allocator_, partial_bytes + arguments.counters * sizeof(unsigned), true);
  arguments.partial = scratch.As<float>();
  arguments.arrived = scratch.As<unsigned>(partial_bytes);
  kernels.clear_counters.Launch(stream, 1, 1, 1, kThreads, &arguments);
  shared.kernel.Launch(stream, ranks, slices, tiles, threads, &arguments);
}

}  // namespace tda
