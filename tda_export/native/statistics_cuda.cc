// tda::NeuronStats, tda::SelectMask and tda::TailMean on CUDA (device/statistics.cu).
#include "statistics_cuda.h"

#include "cuda_module.h"
#include "indexed_ffn_device.h"

namespace tda {
namespace {

constexpr int64_t kSelectThreads = 1024;
constexpr int64_t kGroupThreads = 1024;
constexpr int64_t kGroupTokens = 8;

std::vector<std::string> Defines(ElementType type) { return {"TDA_BF16=" + std::to_string(type == kBfloat16)}; }

CudaKernel StatisticsKernel(ElementType type, const std::string& name, int64_t threads) {
  const std::vector<std::string> defines = Defines(type);
  return CudaModule::Get("statistics", defines).Kernel(name.c_str(), static_cast<int>(threads));
}

void Expect(bool holds, const char* name, const Tensor& tensor, const char* expected) {
  if (!holds) Fail(name, ": expected shape ", expected, ", got ", tensor.Shape());
}

struct StatsArguments {
  const void* h;
  const bool* counted;
  const float* past;
  const float* decay;
  const float* squared_norms;
  float* partial;
  float* present;
  int tokens, neurons, groups;
};

template <ElementType kType>
class NeuronStats : public Kernel {
 public:
  explicit NeuronStats(const KernelInfo& info)
      : allocator_(info), present_stats_(StatisticsKernel(kType, "PresentStats", kThreads)) {
    for (const bool wide : {false, true}) {
      group_sums_[wide] = StatisticsKernel(kType, wide ? "GroupSums_8" : "GroupSums_1", kGroupThreads);
    }
  }

  void Compute(const KernelContext& context) override {
    const Tensor h = context.Input(0), counted = context.Input(1), past = context.Input(2), decay = context.Input(3);
    const Tensor squared_norms = context.Input(4);
    Expect(h.rank == 3 && h.sizes[0] == 1 && h.sizes[1] > 0, "h", h, "[1, tokens, neurons] with a token at least");
    const int64_t tokens = h.sizes[1], neurons = h.sizes[2];
    Expect(counted.Count() == tokens, "counted", counted, "[tokens]");
    Expect(past.rank == 2 && past.sizes[0] == 2 && past.sizes[1] == neurons, "past_stats", past, "[2, neurons]");
    Expect(decay.Count() == 1, "decay", decay, "[1]");
    Expect(!squared_norms.present || squared_norms.Count() == neurons, "squared_norms", squared_norms, "[neurons]");
    const Tensor present = context.OutputLike(0, past);

    const bool wide = neurons % kWide == 0 && SuitsWideLoads(h);
    const int64_t groups = CeilDivide(tokens, kGroupTokens);
    const Scratch scratch(context, allocator_, groups * 2 * neurons * sizeof(float), true);
    StatsArguments arguments = {};
    arguments.h = h.data;
    arguments.counted = counted.As<const bool>();
    arguments.past = past.As<const float>();
    arguments.decay = decay.As<const float>();
    arguments.squared_norms = squared_norms.As<const float>();
    arguments.partial = scratch.As<float>();
    arguments.present = present.As<float>();
    arguments.tokens = static_cast<int>(tokens);
    arguments.neurons = static_cast<int>(neurons);
    arguments.groups = static_cast<int>(groups);
    void* stream = context.CudaStream();
    group_sums_[wide].Launch(stream, groups, 1, 1, kGroupThreads, &arguments);
    present_stats_.Launch(stream, CeilDivide(2 * neurons, kThreads), 1, 1, kThreads, &arguments);
  }

 private:
  const Allocator allocator_;
  CudaKernel group_sums_[2];  // by wide loads
  const CudaKernel present_stats_;
};

struct MaskArguments {
  const float* stats;
  const float* weight;
  const float* threshold;
  int32_t* indices;
  bool* keep;
  int neurons;
};

// The indices are padded with -1 to all neurons: their number is known only on the device, and buffers keep their size.
class SelectMask : public Kernel {
 public:
  explicit SelectMask(const KernelInfo& info)
      : layer_(info.Int("layer")),
        select_(StatisticsKernel(kHalf, "SelectMask", kSelectThreads)) {}

  void Compute(const KernelContext& context) override {
    const Tensor stats = context.Input(0), weight = context.Input(1), thresholds = context.Input(2);
    Expect(stats.rank == 2 && stats.sizes[0] == 2, "stats", stats, "[2, neurons]");
    Expect(weight.Count() == 1, "weight", weight, "[1]");
    if (layer_ < 0 || layer_ >= thresholds.Count()) {
      Fail("thresholds: layer ", layer_, " has no entry in shape ", thresholds.Shape());
    }
    const int64_t neurons = stats.sizes[1];
    const Tensor indices = context.Output(0, {neurons}), keep = context.Output(1, {neurons});
    const MaskArguments arguments = {stats.As<const float>(),
                                     weight.As<const float>(),
                                     thresholds.As<const float>() + layer_,
                                     indices.As<int32_t>(),
                                     keep.As<bool>(),
                                     static_cast<int>(neurons)};
    select_.Launch(context.CudaStream(), 1, 1, 1, kSelectThreads, &arguments);
  }

 private:
  const int64_t layer_;
  const CudaKernel select_;
};

struct TailArguments {
  const float* stats;
  const float* weight;
  const bool* keep;
  float* h;
  unsigned* arrived;
  int neurons, counters;
};

template <ElementType kType>
class TailMean : public Kernel {
 public:
  explicit TailMean(const KernelInfo& info)
      : allocator_(info),
        activations_(StatisticsKernel(kType, "TailActivations", kThreads)) {
    // As for ReLU, rows of zero activations are not read.
    std::vector<std::string> defines = Defines(kType);
    defines.insert(defines.end(), {"TDA_ACTIVATION=3", "TDA_GATED=1"});
    down_sums_[false] = CudaModule::Get("indexed_ffn", defines).Kernel("DownSums_1_1", kThreads);
    down_sums_[true] = CudaModule::Get("indexed_ffn", defines).Kernel("DownSums_1_8", kThreads);
  }

  void Compute(const KernelContext& context) override {
    const Tensor stats = context.Input(0), weight = context.Input(1), keep = context.Input(2), down = context.Input(3);
    Expect(down.rank == 2 && down.sizes[0] > 0 && down.sizes[1] > 0, "w_down", down, "[neurons, hidden size]");
    const int64_t neurons = down.sizes[0], hidden = down.sizes[1];
    Expect(stats.rank == 2 && stats.sizes[0] == 2 && stats.sizes[1] == neurons, "stats", stats, "[2, neurons]");
    Expect(weight.Count() == 1, "weight", weight, "[1]");
    Expect(keep.Count() == neurons, "keep", keep, "[neurons]");
    const Tensor tail = context.Output(0, {hidden});

    const bool wide = hidden % kWide == 0 && SuitsWideLoads(down);
    const DownSumsLayout layout(down_sums_[wide], 1, hidden, neurons, wide);
    const Scratch scratch(context, allocator_, layout.bytes, true);
    FfnArguments sums = {};
    layout.Place(scratch, sums);
    sums.down = down.data;
    sums.y = tail.data;
    sums.tokens = 1;
    sums.hidden = static_cast<int>(hidden);
    sums.neurons = sums.indices = static_cast<int>(neurons);
    const TailArguments means = {stats.As<const float>(), weight.As<const float>(), keep.As<const bool>(),
                                 sums.h,                  sums.arrived,             sums.neurons,
                                 sums.counters};
    void* stream = context.CudaStream();
    activations_.Launch(stream, CeilDivide(neurons, kThreads), 1, 1, kThreads, &means);
    down_sums_[wide].Launch(stream, layout.groups, layout.slices, layout.tiles, kThreads, &sums);
  }

 private:
  const Allocator allocator_;
  const CudaKernel activations_;
  CudaKernel down_sums_[2];  // by wide loads
};

}  // namespace

std::vector<OpDefinition> StatisticsOnCuda() {
  auto stats = [](ElementType type, KernelFactory create) {
    return OpDefinition("NeuronStats", kCudaProvider, {{type}, {kBool}, {kFloat}, {kFloat}, {kFloat, true}}, {{kFloat}},
                        create);
  };
  auto tail = [](ElementType type, KernelFactory create) {
    return OpDefinition("TailMean", kCudaProvider, {{kFloat}, {kFloat}, {kBool}, {type}}, {{type}}, create);
  };
  return {
      stats(kHalf, Create<NeuronStats<kHalf>>),
      stats(kBfloat16, Create<NeuronStats<kBfloat16>>),
      OpDefinition("SelectMask", kCudaProvider, {{kFloat}, {kFloat}, {kFloat}}, {{kInt32}, {kBool}},
                   Create<SelectMask>),
      tail(kHalf, Create<TailMean<kHalf>>),
      tail(kBfloat16, Create<TailMean<kBfloat16>>),
  };
}

}  // namespace tda
