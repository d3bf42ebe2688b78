// tda::GreedyToken: the index of the largest logit of each token, the first of equal ones; -1 where one is not finite.
#include "greedy.h"

#include <algorithm>
#include <cmath>

#include "cuda_module.h"

namespace tda {
namespace {

constexpr int64_t kThreads = 256;  // as in device/greedy.cu
constexpr int64_t kWarp = 32;

// Describe the call: logits float32 [.., V].
struct Call {
  explicit Call(const KernelContext& context) : logits(context.Input(0)) {
    if (logits.rank == 0 || logits.sizes[logits.rank - 1] == 0) {
      Fail("logits: expected shape [.., vocabulary], got ", logits.Shape());
    }
    vocabulary = logits.sizes[logits.rank - 1];
    Tensor shape = logits;
    --shape.rank;
    count = shape.Count();
    tokens = context.OutputLike(0, shape);
  }

  Tensor logits, tokens;
  int64_t vocabulary, count;
};

class GreedyTokenCpu : public Kernel {
 public:
  explicit GreedyTokenCpu(const KernelInfo&) {}

  void Compute(const KernelContext& context) override {
    const Call call(context);
    for (int64_t t = 0; t < call.count; ++t) {
      const float* logits = call.logits.As<const float>() + t * call.vocabulary;
      float spoiled = 0.0f;  // zero times a number that is not finite is NaN
      float largest = logits[0];
      for (int64_t i = 0; i < call.vocabulary; ++i) {
        spoiled += 0.0f * logits[i];
        largest = std::max(largest, logits[i]);
      }
      call.tokens.As<int64_t>()[t] =
          std::isnan(spoiled) ? -1 : std::find(logits, logits + call.vocabulary, largest) - logits;
    }
  }
};

struct GreedyArguments {
  const float* logits;
  float* best;
  int32_t* place;
  int64_t* tokens;
  int vocabulary, blocks;
};

class GreedyTokenCuda : public Kernel {
 public:
  explicit GreedyTokenCuda(const KernelInfo& info)
      : allocator_(info),
        shares_(CudaModule::Get("greedy", {"TDA_BF16=0"}).Kernel("BestOfShares", kThreads)),
        all_(CudaModule::Get("greedy", {"TDA_BF16=0"}).Kernel("BestOfAll", kWarp)) {}

  void Compute(const KernelContext& context) override {
    const Call call(context);
    if (call.count == 0) return;
    const int64_t blocks = std::min<int64_t>(kWarp, (call.vocabulary + kThreads - 1) / kThreads);
    const int64_t cells = call.count * blocks;
    const Scratch scratch(context, allocator_, cells * (sizeof(float) + sizeof(int32_t)), true);
    const GreedyArguments arguments = {call.logits.As<const float>(),
                                       scratch.As<float>(),
                                       scratch.As<int32_t>(cells * sizeof(float)),
                                       call.tokens.As<int64_t>(),
                                       static_cast<int>(call.vocabulary),
                                       static_cast<int>(blocks)};
    void* stream = context.CudaStream();
    shares_.Launch(stream, blocks, call.count, 1, kThreads, &arguments);
    all_.Launch(stream, call.count, 1, 1, kWarp, &arguments);
  }

 private:
  const Allocator allocator_;
  const CudaKernel shares_, all_;
};

}  // namespace

OpDefinition GreedyTokenOnCpu() {
  return OpDefinition("GreedyToken", nullptr, {{kFloat}}, {{kInt64}}, Create<GreedyTokenCpu>);
}

OpDefinition GreedyTokenOnCuda() {
  return OpDefinition("GreedyToken", kCudaProvider, {{kFloat}}, {{kInt64}}, Create<GreedyTokenCuda>);
}

}  // namespace tda
