// tda::RowLinear on CUDA (device/row_linear.cu): one launch, where the GPU has clusters.
#include "row_linear_cuda.h"

#include <algorithm>
#include <map>
#include <mutex>

#include "cuda_module.h"
#include "indexed_ffn_device.h"
#include "row_linear.h"

namespace tda {
namespace {

constexpr int64_t kMostRanks = 16;  // blocks of a cluster

struct RowLinearArguments {
  const void* x;
  const void* weight;
  const float* row_price;
  const float* price;
  const void* bias;
  float* partial;
  unsigned* arrived;
  void* y;
  int tokens, inputs, outputs, counters;
  int early;
};

// A kernel, and how many blocks can share the rows of a slice of columns.
struct SharedKernel {
  CudaKernel kernel;
  int64_t warps;
  int resident_clusters[kMostRanks + 1] = {};  // by blocks of a cluster

  // As many blocks as run at once when there are so many sums of slices, but none without rows for each of its warps.
  int64_t Ranks(int64_t sums, int64_t inputs, bool clusters) const {
    const int64_t most = std::max<int64_t>(1, CeilDivide(inputs, warps * kRowsTogether));
    if (!clusters) return std::clamp<int64_t>(kernel.resident_blocks / sums, 1, most);
    int64_t ranks = std::min(most, kMostRanks);
    while (ranks > 1 && resident_clusters[ranks] < sums) --ranks;
    return ranks;
  }
};

// The kernels of one element type on one GPU.
struct RowLinearKernels {
  explicit RowLinearKernels(ElementType type)
      : multiprocessors(CudaDevice::Current().multiprocessors),
        clusters(HasClusters(CudaDevice::Current().capability)) {
    const std::vector<std::string> defines = {"TDA_BF16=" + std::to_string(type == kBfloat16),
                                              "TDA_CLUSTERS=" + std::to_string(clusters)};
    const CudaModule* const module = &CudaModule::Get("row_linear", defines);
    auto shared = [&](const char* name, int64_t warps) {
      SharedKernel made = {module->Kernel(name, static_cast<int>(warps * kWarp)), warps};
      for (unsigned ranks = 1; clusters && ranks <= kMostRanks; ++ranks) {
        made.resident_clusters[ranks] = made.kernel.ResidentClusters(ranks, warps * kWarp);
      }
      return made;
    };
    few_slices = shared("RowLinear_1_8_16_1", 16);
    some_slices = shared("RowLinear_1_8_8_2", 8);
    many_slices = shared("RowLinear_1_8_8_3", 8);
    tile = shared("RowLinear_4_8_8_1", 8);
    narrow = shared("RowLinear_1_1_8_3", 8);
    narrow_tile = shared("RowLinear_4_1_8_1", 8);
    if (!clusters) clear_counters = module->Kernel("ClearCounters", kThreads);
  }

  static const RowLinearKernels& Get(ElementType type) {
    static std::mutex mutex;
    static std::map<std::pair<int, int>, std::unique_ptr<RowLinearKernels>> made;
    const std::lock_guard<std::mutex> lock(mutex);
    std::unique_ptr<RowLinearKernels>& kernels = made[{CudaDevice::Current().device, type}];
    if (kernels == nullptr) kernels = std::make_unique<RowLinearKernels>(type);
    return *kernels;
  }

  const SharedKernel& Choose(int64_t tokens, int64_t slices, bool wide) const {
    if (!wide) return tokens == 1 ? narrow : narrow_tile;
    if (tokens > 1) return tile;
    // The fewer slices there are, the more warps share the rows of one, and larger blocks take fewer steps to add up.
    if (4 * slices < multiprocessors) return few_slices;
    return 2 * slices < multiprocessors ? some_slices : many_slices;
  }

  int64_t multiprocessors;
  bool clusters;
  SharedKernel few_slices, some_slices, many_slices, tile;  // wide loads; of one token, and of a tile of tokens
  SharedKernel narrow, narrow_tile;
  CudaKernel clear_counters;
};

template <ElementType kType>
class RowLinearCuda : public Kernel {
 public:
  explicit RowLinearCuda(const KernelInfo& info) : allocator_(info), early_(info.Flag("early")) {
    RequireDtype(kType);
    kernels_ = &RowLinearKernels::Get(kType);
  }

  void Compute(const KernelContext& context) override {
    const RowLinearCall call(context);
    if (call.y.Count() == 0) return;
    const bool wide = call.outputs % kWide == 0 && SuitsWideLoads(call.weight);
    const int64_t tile = call.tokens == 1 ? 1 : kTile;
    const int64_t tiles = CeilDivide(call.tokens, tile);
    const int64_t slice = kWarp * (wide ? kWide : 1);
    const int64_t slices = CeilDivide(call.outputs, slice);
    const SharedKernel& shared = kernels_->Choose(call.tokens, slices, wide);
    const int64_t ranks = shared.Ranks(slices * tiles, call.inputs, kernels_->clusters);

    RowLinearArguments arguments = {};
    arguments.x = call.x.data;
    arguments.weight = call.weight.data;
    arguments.row_price = call.row_price.As<const float>();
    arguments.price = call.price.As<const float>();
    arguments.bias = call.bias.data;
    arguments.y = call.y.data;
    arguments.tokens = static_cast<int>(call.tokens);
    arguments.inputs = static_cast<int>(call.inputs);
    arguments.outputs = static_cast<int>(call.outputs);
    arguments.early = early_;
    void* stream = context.CudaStream();
    const unsigned threads = static_cast<unsigned>(shared.warps * kWarp);
    if (kernels_->clusters) {
      shared.kernel.Launch(stream, ranks, slices, tiles, threads, &arguments, static_cast<unsigned>(ranks));
      return;
    }
    const size_t partial_bytes = Aligned(tiles * slices * ranks * tile * slice * sizeof(float));
    arguments.counters = static_cast<int>(tiles * slices);
    const Scratch scratch(context, allocator_, partial_bytes + arguments.counters * sizeof(unsigned), true);
    arguments.partial = scratch.As<float>();
    arguments.arrived = scratch.As<unsigned>(partial_bytes);
    kernels_->clear_counters.Launch(stream, 1, 1, 1, kThreads, &arguments);
    shared.kernel.Launch(stream, ranks, slices, tiles, threads, &arguments);
  }

 private:
  const Allocator allocator_;
  const bool early_;
  const RowLinearKernels* kernels_;  // kept for the process
};

}  // namespace

OpDefinition RowLinearOnCuda(ElementType type) {
  return OpDefinition("RowLinear", kCudaProvider, RowLinearInputs(type, {{type}}), {{type}},
                      type == kHalf ? Create<RowLinearCuda<kHalf>> : Create<RowLinearCuda<kBfloat16>>);
}

}  // namespace tda
