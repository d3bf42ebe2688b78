// tda::RowLinear and its forms for integers on the CPU, float32 activations.
#include "row_linear_cpu.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "row_linear.h"
#include "row_sums_cpu.h"

namespace tda {
namespace {

#define TDA_SUMS(attribute, lanes, Format)                                                             \
  attribute void SumChunk(const Format& weight, const ChunkOfToken& chunk, float* sums) {              \
    SumChunkOf<lanes>(weight, chunk, sums);                                                            \
  }                                                                                                    \
  attribute void AddChunks(const Format&, float* sums, int64_t chunks, int64_t stride, int64_t columns, float* y) { \
    AddChunksOf<lanes, Format>(sums, chunks, stride, columns, y);                                      \
  }
#define TDA_ALL_SUMS(attribute, lanes)     \
  TDA_SUMS(attribute, lanes, FloatFormat)   \
  TDA_SUMS(attribute, lanes, CodeFormat<4>) \
  TDA_SUMS(attribute, lanes, CodeFormat<8>)
TDA_FOR_EACH_TARGET(TDA_ALL_SUMS)

// Multiply, given y [tokens, outputs] that holds the bias.
template <class Format>
void Multiply(const KernelContext& context, const Allocator& allocator, const RowLinearCall& call,
              const Format& weight) {
  const RowChunks<Format> chunks(weight, call.inputs);
  const RowPrices prices = {call.row_price.As<const float>(), *call.price.As<const float>()};
  const int64_t stride = WholeBlocks(call.outputs);
  const size_t sums_bytes = chunks.count * stride * sizeof(float);
  const Scratch scratch(context, allocator, sums_bytes + chunks.tiles * sizeof(std::atomic<int64_t>), false);
  std::atomic<int64_t>* ended = scratch.As<std::atomic<int64_t>>(sums_bytes);
  for (int64_t t = 0; t < call.tokens; ++t) {
    const float* x = call.x.As<const float>() + t * call.inputs;
    float* y = call.y.As<float>() + t * call.outputs;
    for (int64_t tile = 0; tile < chunks.tiles; ++tile) new (&ended[tile]) std::atomic<int64_t>(0);
    context.ParallelFor(chunks.count * chunks.tiles, [&](size_t task) {
      const int64_t chunk = task % chunks.count, tile = task / chunks.count;
      const int64_t begin = chunks.FirstColumn(tile), end = chunks.FirstColumn(tile + 1);
      float* sums = scratch.As<float>() + begin;
      SumChunk(weight, {x, prices, chunks.FirstRow(chunk), chunks.FirstRow(chunk + 1), begin, end},
               sums + chunk * stride);
      if (ended[tile].fetch_add(1) + 1 < chunks.count) return;
      AddChunks(weight, sums, chunks.count, stride, end - begin, y + begin);
    });
  }
}

void WriteBias(const RowLinearCall& call) {
  float* y = call.y.As<float>();
  for (int64_t t = 0; t < call.tokens; ++t) {
    if (call.bias.present) {
      std::memcpy(y + t * call.outputs, call.bias.data, call.outputs * sizeof(float));
    } else {
      std::memset(y + t * call.outputs, 0, call.outputs * sizeof(float));
    }
  }
}

class RowLinearCpu : public Kernel {
 public:
  explicit RowLinearCpu(const KernelInfo& info) : allocator_(info) {}

  void Compute(const KernelContext& context) override {
    const RowLinearCall call(context);
    if (call.y.Count() == 0) return;
    WriteBias(call);
    Multiply(context, allocator_, call, FloatFormat{call.weight.As<const float>(), call.outputs});
  }

 private:
  const Allocator allocator_;
};

template <int kBits>
class RowLinearCodesCpu : public Kernel {
 public:
  explicit RowLinearCodesCpu(const KernelInfo& info) : allocator_(info), layout_(info, kBits) {}

  void Compute(const KernelContext& context) override {
    const RowLinearCall call(context, layout_);
    if (call.y.Count() == 0) return;
    WriteBias(call);
    const CodeFormat<kBits> weight = {call.weight.As<const uint8_t>(),
                                      call.scales.As<const uint16_t>(),
                                      call.zero_points.As<const uint8_t>(),
                                      call.inputs,
                                      layout_.columns,
                                      layout_.Packed(layout_.columns),
                                      layout_.Groups(),
                                      layout_.Packed(layout_.Groups()),
                                      __builtin_ctzll(layout_.group)};
    Multiply(context, allocator_, call, weight);
  }

 private:
  const Allocator allocator_;
  const CodeLayout layout_;
};

}  // namespace

std::vector<OpDefinition> RowLinearOnCpu() {
  const std::vector<IoType> of_codes = RowLinearInputs(kFloat, CodeTypes());
  return {
      {"RowLinear", nullptr, RowLinearInputs(kFloat, {{kFloat}}), {{kFloat}}, Create<RowLinearCpu>},
      {"RowLinear4", nullptr, of_codes, {{kFloat}}, Create<RowLinearCodesCpu<4>>},
      {"RowLinear8", nullptr, of_codes, {{kFloat}}, Create<RowLinearCodesCpu<8>>},
  };
}

}  // namespace tda
