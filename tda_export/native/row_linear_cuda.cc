// tda::RowLinear, RowLinear4 and RowLinear8 on CUDA (device/row_linear.cu): one launch for few tokens, where the GPU has
// clusters.
#include "row_linear_cuda.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>

#include "many_tokens_cuda.h"
#include "row_linear.h"

namespace tda {
namespace {

constexpr int64_t kMostRanks = 16;  // blocks of a cluster

struct RowLinearArguments {
  const void* x;
  StoredMatrix weight;
  const float* row_price;
  const float* price;
  const void* bias;
  float* partial;
  unsigned* arrived;
  void* y;
  int tokens, inputs, outputs, counters;
  int early;
};

// A kernel for one token or a tile of them, and how many blocks can share the rows of a slice of columns.
struct SharedKernel {
  CudaKernel kernel;
  int64_t width;  // columns of a thread
  int64_t warps;
  int resident_clusters[kMostRanks + 1] = {};  // by blocks of a cluster

  int64_t Slice() const { return kWarp * width; }

  // As many blocks as run at once when there are so many sums of slices, but none without rows for each of its warps.
  int64_t Ranks(int64_t sums, int64_t inputs, bool clusters) const {
    const int64_t most = std::max<int64_t>(1, CeilDivide(inputs, warps * kRowsTogether));
    if (!clusters) return std::clamp<int64_t>(kernel.resident_blocks / sums, 1, most);
    int64_t ranks = std::min(most, kMostRanks);
    while (ranks > 1 && resident_clusters[ranks] < sums) --ranks;
    return ranks;
  }
};

// The kernels of one element type, and bits of a code, on one GPU.
struct RowLinearKernels {
  RowLinearKernels(ElementType type, int bits)
      : bits(bits == 0 ? 16 : bits),
        multiprocessors(CudaDevice::Current().multiprocessors),
        clusters(HasClusters(CudaDevice::Current().capability)) {
    std::vector<std::string> defines = FormatDefines(type, bits);
    defines.push_back("TDA_CLUSTERS=" + std::to_string(clusters));
    const CudaModule* const module = &CudaModule::Get("row_linear", defines);
    auto shared = [&](int tokens, int64_t width, int64_t warps, int blocks) {
      std::string name = "RowLinear";
      for (const int64_t part : {int64_t{tokens}, width, warps, int64_t{blocks}}) name += "_" + std::to_string(part);
      SharedKernel made = {module->Kernel(name.c_str(), static_cast<int>(warps * kWarp)), width, warps};
      for (unsigned ranks = 1; clusters && ranks <= kMostRanks; ++ranks) {
        made.resident_clusters[ranks] = made.kernel.ResidentClusters(ranks, warps * kWarp);
      }
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
    tile = shared(4, 8, 8, 1);
    narrow = shared(1, 1, 8, 3);
    narrow_tile = shared(4, 1, 8, 1);
    if (!clusters) clear_counters = module->Kernel("ClearCounters", kThreads);
  }

  static const RowLinearKernels& Get(ElementType type, int bits) {
    static std::mutex mutex;
    static std::map<std::tuple<int, int, int>, std::unique_ptr<RowLinearKernels>> made;
    const std::lock_guard<std::mutex> lock(mutex);
    std::unique_ptr<RowLinearKernels>& kernels = made[{CudaDevice::Current().device, type, bits}];
    if (kernels == nullptr) kernels = std::make_unique<RowLinearKernels>(type, bits);
    return *kernels;
  }

  const SharedKernel& Choose(int64_t tokens, const StoredMatrix& matrix) const {
    if (!SuitsLoads(matrix, kWide, bits)) return tokens == 1 ? narrow : narrow_tile;
    if (tokens > 1) return tile;
    for (const auto& [kernel, least_slices] : wide) {
      const bool suits = SuitsLoads(matrix, kernel.width, bits);
      if (suits && CeilDivide(matrix.columns, kernel.Slice()) >= least_slices) return kernel;
    }
    return wide.back().first;
  }

  int64_t bits;  // of a column
  int64_t multiprocessors;
  bool clusters;
  std::vector<std::pair<SharedKernel, int64_t>> wide;  // of one token, each with the slices that it is worth it from
  SharedKernel tile;                                   // of a tile of tokens
  SharedKernel narrow, narrow_tile;
  CudaKernel clear_counters;
};

template <ElementType kType, int kBits>
class RowLinearCuda : public Kernel {
 public:
  explicit RowLinearCuda(const KernelInfo& info)
      : allocator_(info), early_(info.Flag("early")), many_tokens_(info, kType, kBits) {
    if constexpr (kBits > 0) layout_.emplace(info, kBits);
    kernels_ = &RowLinearKernels::Get(kType, kBits);
  }

  void Compute(const KernelContext& context) override {
    if constexpr (kBits > 0) {
      const RowLinearCall call(context, *layout_);
      Multiply(context, call, StoredCodes(*layout_, call.weight, call.scales, call.zero_points));
    } else {
      const RowLinearCall call(context);
      Multiply(context, call, StoredElements(call.weight));
    }
  }

 private:
  void Multiply(const KernelContext& context, const RowLinearCall& call, const StoredMatrix& matrix) const {
    if (call.y.Count() == 0) return;
    if (many_tokens_.Pays(call.tokens)) {
      many_tokens_.Multiply(context, {call.x.data, matrix, false, call.tokens, call.inputs, call.outputs, call.y.data,
                                      call.row_price.As<const float>(), call.price.As<const float>(), call.bias.data});
      return;
    }
    const SharedKernel& shared = kernels_->Choose(call.tokens, matrix);
    const int64_t tile = call.tokens == 1 ? 1 : kTile;
    const int64_t tiles = CeilDivide(call.tokens, tile);
    const int64_t slices = CeilDivide(call.outputs, shared.Slice());
    const int64_t ranks = shared.Ranks(slices * tiles, call.inputs, kernels_->clusters);

    RowLinearArguments arguments = {};
    arguments.x = call.x.data;
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
    const unsigned threads = static_cast<unsigned>(shared.warps * kWarp);
    if (kernels_->clusters) {
      shared.kernel.Launch(stream, ranks, slices, tiles, threads, &arguments, static_cast<unsigned>(ranks));
      return;
    }
    const size_t partial_bytes = Aligned(tiles * slices * ranks * tile * shared.Slice() * sizeof(float));
    arguments.counters = static_cast<int>(tiles * slices);
    const Scratch scratch(context, allocator_, partial_bytes + arguments.counters * sizeof(unsigned), true);
    arguments.partial = scratch.As<float>();
    arguments.arrived = scratch.As<unsigned>(partial_bytes);
    kernels_->clear_counters.Launch(stream, 1, 1, 1, kThreads, &arguments);
    shared.kernel.Launch(stream, ranks, slices, tiles, threads, &arguments);
  }

  const Allocator allocator_;
  const bool early_;
  const ManyTokens many_tokens_;
  std::optional<CodeLayout> layout_;   // where there are codes
  const RowLinearKernels* kernels_;  // kept for the process
};

template <ElementType kType>
void Define(std::vector<OpDefinition>& definitions) {
  auto define = [&](const char* name, std::vector<IoType> weight, KernelFactory create) {
    definitions.emplace_back(name, kCudaProvider, RowLinearInputs(kType, std::move(weight)),
                             std::vector<IoType>{{kType}}, create);
  };
  define("RowLinear", {{kType}}, Create<RowLinearCuda<kType, 0>>);
  define("RowLinear4", CodeTypes(), Create<RowLinearCuda<kType, 4>>);
  define("RowLinear8", CodeTypes(), Create<RowLinearCuda<kType, 8>>);
}

}  // namespace

std::vector<OpDefinition> RowLinearOnCuda() {
  std::vector<OpDefinition> definitions;
  Define<kHalf>(definitions);
  Define<kBfloat16>(definitions);
  return definitions;
}

}  // namespace tda
