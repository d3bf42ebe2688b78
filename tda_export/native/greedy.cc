// tda::GreedyToken: the index of the largest logit of each token, the first of equal ones; -1 where one is not finite.
#include "greedy.h"

#include <algorithm>
#include <cmath>

#include "cuda_module.h"
#include "vectors.h"

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

// Return the place of the largest number, the first of equal ones, or -1 where one is not finite. Blocks are compared by
// their largest number, and only the block that has the largest of all is searched.
template <int kLanes>
TDA_INLINE int64_t PlaceOf(const float* numbers, int64_t count) {
  using V = Lanes<kLanes>;
  constexpr int64_t kBlock = 1024, kVectors = 4;  // vectors that are compared at the same time
  typename V::Vector spoiled[kVectors] = {};     // zero times a number that is not finite is NaN
  float largest = numbers[0], spoiled_rest = 0.0f;
  int64_t block = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, count);
    typename V::Vector own[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) own[v] = typename V::Vector{} + numbers[begin];
    int64_t i = begin;
    for (; i + kVectors * kLanes <= end; i += kVectors * kLanes) {
      for (int64_t v = 0; v < kVectors; ++v) {
        const typename V::Vector loaded = V::Load(numbers + i + v * kLanes);
        spoiled[v] += 0.0f * loaded;
        own[v] = loaded > own[v] ? loaded : own[v];
      }
    }
    float of_block = numbers[begin];
    for (; i < end; ++i) {
      spoiled_rest += 0.0f * numbers[i];
      of_block = std::max(of_block, numbers[i]);
    }
    for (int64_t v = 0; v < kVectors; ++v) {
      for (int lane = 0; lane < kLanes; ++lane) of_block = std::max(of_block, own[v][lane]);
    }
    if (of_block > largest) {
      largest = of_block;
      block = begin;
    }
  }
  for (int64_t v = 0; v < kVectors; ++v) {
    for (int lane = 0; lane < kLanes; ++lane) spoiled_rest += spoiled[v][lane];
  }
  if (std::isnan(spoiled_rest)) return -1;
  return std::find(numbers + block, numbers + std::min(block + kBlock, count), largest) - numbers;
}

#define TDA_PLACE(attribute, lanes)                                       \
  attribute int64_t PlaceOfLargest(const float* numbers, int64_t count) { \
    return PlaceOf<lanes>(numbers, count);                                \
  }
TDA_FOR_EACH_TARGET(TDA_PLACE)

class GreedyTokenCpu : public Kernel {
 public:
  explicit GreedyTokenCpu(const KernelInfo&) {}

  void Compute(const KernelContext& context) override {
    const Call call(context);
    for (int64_t t = 0; t < call.count; ++t) {
      const float* logits = call.logits.As<const float>() + t * call.vocabulary;
      call.tokens.As<int64_t>()[t] = PlaceOfLargest(logits, call.vocabulary);
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
