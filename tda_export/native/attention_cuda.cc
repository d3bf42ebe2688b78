// tda::Attention and tda::Attention8 on CUDA (device/attention.cu): parts of the cache at the same time, joined by the
// blocks of a cluster where the GPU has clusters, and otherwise by a second kernel.
#include "attention_cuda.h"

#include <algorithm>
#include <iterator>

#include "attention.h"
#include "cuda_matrix.h"

namespace tda {
namespace {

constexpr int64_t kAttentionThreads = 128;  // of a block, unless it is a wide one
constexpr int64_t kPadding = 8;         // floats after a head's sum by matrices
constexpr int64_t kLoadBytes = 16;      // of a key, for one lane
constexpr int64_t kMostSize = 256;      // elements of a head
constexpr int64_t kSizes[] = {64, 128, 256};  // the largest head of each of the kernels
constexpr int64_t kMostSplits = 64;     // without clusters
constexpr int64_t kMostRanks = 16;      // blocks of a cluster
constexpr int64_t kFewTokens = 16;      // of more there are blocks enough without parts of the cache
constexpr int64_t kCopyingBlocks = 256;

struct AttentionArguments {
  const void* query;
  const void* key;
  const void* value;
  const void* past_key;
  const void* past_value;
  void* present_key;
  void* present_value;
  const void* past_key_scale;
  const void* past_value_scale;
  void* present_key_scale;
  void* present_value_scale;
  const void* cos;
  const void* sin;
  const int32_t* last_index;
  float* partial;
  void* attended;
  int tokens, heads, kv_heads, size, pairs, past_room, room, most, buffer, splits;
  int query_stride, key_stride, value_stride;
  int window;
  int interleaved;
  int appends;
  float scale, softcap;
};

bool IsInPlace(const Tensor& past, const Tensor& present) { return past.data == present.data; }

// A kernel, and how many parts of the cache it takes.
struct AttendKernel {
  CudaKernel kernel;
  int64_t threads = kAttentionThreads;
  int64_t splits = 1;
};

// kCache: the type of keys and values in the cache, kType or kInt8.
template <ElementType kType, ElementType kCache>
class AttentionCuda : public Kernel {
  static constexpr bool kScaled = kCache == kInt8;
  static constexpr int64_t kLaneElements = kLoadBytes / (kScaled ? 1 : 2);
  static constexpr bool kMatrices = kScaled || kType == kHalf;  // attend by tensor cores, from Ampere on

 public:
  explicit AttentionCuda(const KernelInfo& info)
      : allocator_(info),
        settings_(info),
        heads_at_once_(HeadsAtOnce(settings_.heads / settings_.kv_heads)),
        tiles_(settings_.kv_heads * CeilDivide(settings_.heads / settings_.kv_heads, heads_at_once_)),
        clusters_(HasClusters(CudaDevice::Current().capability)) {
    RequireDtype(kType);
    const CudaModule& module = CudaModule::Get("attention", {"TDA_BF16=" + std::to_string(kType == kBfloat16),
                                                             "TDA_KV_CODES=" + std::to_string(kScaled),
                                                             "TDA_CLUSTERS=" + std::to_string(clusters_),
                                                             "TDA_HEADS=" + std::to_string(heads_at_once_)});
    append_ = module.Kernel("AppendTokens", kAttentionThreads);
    copy_ = module.Kernel("CopyPast", kAttentionThreads);
    if (!clusters_) join_ = module.Kernel("JoinParts", kAttentionThreads);
    for (size_t i = 0; i < std::size(kSizes); ++i) {
      many_tokens_[i].kernel = Attend(module, kSizes[i], kAttentionThreads);
      few_tokens_[i] = ForFewTokens(module, kSizes[i], many_tokens_[i].kernel);
    }
  }

  void Compute(const KernelContext& context) override {
    const AttentionCall call(context, settings_, kScaled);
    if (call.size % kLaneElements || call.size > kMostSize) {
      Fail("query: heads of ", call.size, " elements; on CUDA they have a multiple of ", kLaneElements, ", at most ",
           kMostSize);
    }
    const int64_t most = call.pairs > 0 ? std::min(call.room, call.cos.sizes[0]) : call.room;
    if (call.tokens > most) Fail("query: ", call.tokens, " tokens do not fit into a cache of ", most);
    const AttendKernel& attend =
        (call.tokens > kFewTokens ? many_tokens_ : few_tokens_)[call.size <= 64 ? 0 : call.size <= 128 ? 1 : 2];
    const bool has_parts = attend.splits > 1;
    const size_t partial_bytes =
        has_parts && !clusters_ ? call.tokens * settings_.heads * attend.splits * (call.size + 2) * sizeof(float) : 1;
    const Scratch scratch(context, allocator_, partial_bytes, true);
    const bool in_place = IsInPlace(call.past_key, call.present_key) &&
                          IsInPlace(call.past_value, call.present_value) &&
                          IsInPlace(call.past_key_scale, call.present_key_scale) &&
                          IsInPlace(call.past_value_scale, call.present_value_scale);

    AttentionArguments arguments = {};
    arguments.query = call.Query<uint16_t>(0);
    arguments.key = call.Key<uint16_t>(0);
    arguments.value = call.Value<uint16_t>(0);
    arguments.past_key = call.past_key.data;
    arguments.past_value = call.past_value.data;
    arguments.present_key = call.present_key.data;
    arguments.present_value = call.present_value.data;
    arguments.past_key_scale = call.past_key_scale.data;
    arguments.past_value_scale = call.past_value_scale.data;
    arguments.present_key_scale = call.present_key_scale.data;
    arguments.present_value_scale = call.present_value_scale.data;
    arguments.cos = call.cos.data;
    arguments.sin = call.sin.data;
    arguments.last_index = call.last_index.As<const int32_t>();
    arguments.partial = scratch.As<float>();
    arguments.attended = call.attended.data;
    arguments.tokens = static_cast<int>(call.tokens);
    arguments.heads = static_cast<int>(settings_.heads);
    arguments.kv_heads = static_cast<int>(settings_.kv_heads);
    arguments.size = static_cast<int>(call.size);
    arguments.pairs = static_cast<int>(call.pairs);
    arguments.past_room = static_cast<int>(call.past_room);
    arguments.room = static_cast<int>(call.room);
    arguments.most = static_cast<int>(most);
    arguments.buffer = static_cast<int>(call.buffer);
    arguments.splits = static_cast<int>(attend.splits);
    arguments.query_stride = static_cast<int>(call.QueryStride());
    arguments.key_stride = arguments.value_stride = static_cast<int>(call.KeyStride());
    arguments.window = static_cast<int>(settings_.window);
    arguments.interleaved = settings_.interleaved;
    arguments.appends = call.tokens == 1;
    arguments.scale = call.scale;
    arguments.softcap = settings_.softcap;

    void* stream = context.CudaStream();
    const unsigned kv_heads = static_cast<unsigned>(settings_.kv_heads), tokens = static_cast<unsigned>(call.tokens);
    if (!in_place && call.room > 0) {
      copy_.Launch(stream, std::min(call.room, kCopyingBlocks), kv_heads, 2, kAttentionThreads, &arguments);
    }
    if (tokens == 0) return;
    if (!arguments.appends) append_.Launch(stream, tokens, kv_heads, 1, kAttentionThreads, &arguments);
    attend.kernel.Launch(stream, attend.splits, tiles_, tokens, attend.threads, &arguments,
                         has_parts && clusters_ ? attend.splits : 0);
    if (has_parts && !clusters_) {
      join_.Launch(stream, settings_.heads, tokens, 1, kAttentionThreads, &arguments);
    }
  }

 private:
  static int64_t HeadsAtOnce(int64_t group) { return group == 1 ? 1 : group == 2 ? 2 : 4; }

  // What fills the GPU: more blocks than that wait for others (device/attention.cu).
  static int64_t FullGpu(int64_t size) {
    const int64_t blocks = !kScaled && kMatrices && size == kMostSize ? 2 : 4;  // on a multiprocessor
    return blocks * CudaDevice::Current().multiprocessors;
  }

  CudaKernel Attend(const CudaModule& module, int64_t size, int64_t threads) const {
    std::string name = "Attend";
    for (const int64_t part : {size, heads_at_once_, threads}) name += "_" + std::to_string(part);
    // Wide blocks have their sums in dynamic memory (device/kv_sums.cuh, device/kv_sums_matrices.cuh).
    const int64_t sums = kMatrices ? threads / kWarp * (size + kPadding) : threads * kLaneElements;
    const int64_t bytes = threads > kAttentionThreads ? sums * heads_at_once_ * static_cast<int64_t>(sizeof(float)) : 0;
    return module.Kernel(name.c_str(), static_cast<int>(threads), static_cast<unsigned>(bytes));
  }

  // Choose for heads of a size. The number of tokens has no say, so that it changes no bit. Wide blocks have as many bytes
  // under way on a multiprocessor, of which each then has one at most; their smaller clusters start sooner after a product
  // that fills the GPU. They won where clusters of them have at least two: heads of 128, floats, 8 to 40 key-value heads on
  // an H200. Other heads and caches follow.
  AttendKernel ForFewTokens(const CudaModule& module, int64_t size, const CudaKernel& narrow) const {
    const int64_t splits = std::max<int64_t>(1, CeilDivide(FullGpu(size), tiles_));
    if (!clusters_) return {narrow, kAttentionThreads, std::min(splits, kMostSplits)};
    const int64_t threads = size < kMostSize ? 512 : 256;
    const AttendKernel wide = Resident({Attend(module, size, threads), threads, std::min(splits, kMostRanks)});
    return wide.splits > 1 ? wide : Resident({narrow, kAttentionThreads, std::min(splits, kMostRanks)});
  }

  // Split less, so that all clusters of a token run at the same time. The driver is asked in any case, since that permits
  // the size.
  AttendKernel Resident(AttendKernel chosen) const {
    while (chosen.splits > 1 && chosen.kernel.ResidentClusters(chosen.splits, chosen.threads) < tiles_) --chosen.splits;
    return chosen;
  }

  const Allocator allocator_;
  const AttentionSettings settings_;
  const int64_t heads_at_once_, tiles_;  // heads that share a key-value head, and how many such tiles there are
  const bool clusters_;                  // that join the parts
  CudaKernel append_, copy_, join_;
  AttendKernel few_tokens_[std::size(kSizes)], many_tokens_[std::size(kSizes)];
};

template <ElementType kType, ElementType kCache>
OpDefinition Define(const char* name) {
  return OpDefinition(name, kCudaProvider, AttentionInputs(kType, kCache), AttentionOutputs(kType, kCache),
                      Create<AttentionCuda<kType, kCache>>);
}

}  // namespace

std::vector<OpDefinition> AttentionOnCuda() {
  return {Define<kHalf, kHalf>("Attention"), Define<kBfloat16, kBfloat16>("Attention"),
          Define<kHalf, kInt8>("Attention8"), Define<kBfloat16, kInt8>("Attention8")};
}

}  // namespace tda
