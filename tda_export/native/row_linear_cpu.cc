// tda::RowLinear and its forms for integers on the CPU, float32 activations.
//
// A few tokens are computed one by one, or share the codes that they read: ONNX Runtime's thread pool gets chunks of rows
// (row_sums_cpu.h), in tiles of columns where rows are long, and the thread that ends the last chunk of a tile adds the
// chunks up. Many tokens are computed as a product of matrices (row_panels_cpu.h), whose panels of columns are distributed
// over threads.
#include "row_linear_cpu.h"

#include <algorithm>
#include <atomic>

#include "row_linear.h"
#include "row_panels_cpu.h"
#include "row_sums_cpu.h"

namespace tda {
namespace {


constexpr int64_t kFewTokens = 8;  // that go one by one where codes become floats

#define TDA_OF_FORMAT(attribute, lanes, Format)                                                           \
  attribute bool MultipliesBytes(const Format&) { return MultipliesBytesOf<lanes, Format>(); }             \
  attribute void SumChunk(const Format& weight, const ChunkOfTokens& chunk) {                             \
    SumChunkOf<lanes>(weight, chunk);                                                                     \
  }                                                                                                       \
  attribute void AddChunks(const Format&, float* sums, int64_t chunks, int64_t stride, int64_t columns,   \
                           const float* bias, float* y) {                                                 \
    AddChunksOf<lanes, Format>(sums, chunks, stride, columns, bias, y);                                   \
  }                                                                                                       \
  attribute void MultiplyPanel(const Format& weight, const TokenTile& tile, int64_t begin, const float* bias, \
                               float* y) {                                                                \
    MultiplyPanelOf<lanes>(weight, tile, begin, bias, y);                                                 \
  }
#define TDA_OF_ALL_FORMATS(attribute, lanes)                                                                  \
  attribute void ListRowsOf(TokenTile& tile) { ListTileRows(tile); }                                          \
  attribute void PrepareValues(const TokenTile& tile, int64_t begin) { PrepareValuesOf<lanes>(tile, begin); } \
  attribute int64_t PanelColumns() { return PanelShape<lanes>::kColumns; }                                    \
  TDA_OF_FORMAT(attribute, lanes, FloatFormat)                                                                \
  TDA_OF_FORMAT(attribute, lanes, CodeFormat<4>)                                                              \
  TDA_OF_FORMAT(attribute, lanes, CodeFormat<8>)
TDA_FOR_EACH_TARGET(TDA_OF_ALL_FORMATS)

RowPrices PricesOf(const RowLinearCall& call) {
  return {call.row_price.As<const float>(), *call.price.As<const float>()};
}

template <class Format>
void MultiplyFew(const KernelContext& context, const Allocator& allocator, const RowLinearCall& call,
                 const Format& weight) {
  const RowChunks<Format> chunks(weight, call.inputs);
  const RowPrices prices = PricesOf(call);
  const int64_t stride = WholeBlocks(call.outputs), tasks = chunks.count * chunks.tiles;
  const size_t sums_bytes = call.tokens * chunks.count * stride * sizeof(float);
  const Scratch scratch(context, allocator, sums_bytes + chunks.tiles * sizeof(std::atomic<int64_t>), false);
  std::atomic<int64_t>* ended = scratch.As<std::atomic<int64_t>>(sums_bytes);
  for (int64_t tile = 0; tile < chunks.tiles; ++tile) new (&ended[tile]) std::atomic<int64_t>(0);
  context.ParallelFor(tasks, [&](size_t task) {
    const int64_t chunk = task % chunks.count, tile = task / chunks.count;
    const int64_t begin = chunks.FirstColumn(tile), end = chunks.FirstColumn(tile + 1);
    float* const sums = scratch.As<float>() + begin;
    const int64_t token_stride = chunks.count * stride;
    SumChunk(weight, {call.x.As<const float>(), call.tokens, call.inputs, prices, chunks.FirstRow(chunk),
                      chunks.FirstRow(chunk + 1), begin, end, sums + chunk * stride, token_stride});
    if (ended[tile].fetch_add(1) + 1 < chunks.count) return;
    const float* bias = call.bias.present ? call.bias.As<const float>() + begin : nullptr;
    for (int64_t t = 0; t < call.tokens; ++t) {
      float* y = call.y.As<float>() + t * call.outputs + begin;
      AddChunks(weight, sums + t * token_stride, chunks.count, stride, end - begin, bias, y);
    }
  });
}

template <class Format>
void MultiplyMany(const KernelContext& context, const Allocator& allocator, const RowLinearCall& call,
                  const Format& weight) {
  const int64_t tiles = (call.tokens + kTokenTile - 1) / kTokenTile;
  const int64_t tile_tokens = std::min(kTokenTile, (call.tokens + 7) / 8 * 8);
  const int64_t width = PanelColumns(), panels = (call.outputs + width - 1) / width;
  const int64_t tile_bytes = call.inputs * (tile_tokens * sizeof(float) + sizeof(int32_t) + sizeof(uint8_t));
  const Scratch scratch(context, allocator, tiles * ((tile_bytes + 63) / 64 * 64), false);
  std::vector<TokenTile> made(tiles);
  context.ParallelFor(tiles, [&](size_t number) {
    const int64_t first = number * kTokenTile;
    const size_t at = number * ((tile_bytes + 63) / 64 * 64);
    TokenTile& tile = made[number];
    tile.x = call.x.As<const float>() + first * call.inputs;
    tile.tokens = std::min(kTokenTile, call.tokens - first);
    tile.inputs = call.inputs;
    tile.prices = PricesOf(call);
    tile.chunks = RowChunks<Format>(weight, call.inputs).count;
    tile.values = scratch.As<float>(at);
    tile.rows = scratch.As<int32_t>(at + call.inputs * tile_tokens * sizeof(float));
    tile.needed = scratch.As<uint8_t>(at + call.inputs * (tile_tokens * sizeof(float) + sizeof(int32_t)));
    ListRowsOf(tile);
  });
  constexpr int64_t kParts = kTokenTile / kTokensAtOnce;
  context.ParallelFor((call.tokens + kTokensAtOnce - 1) / kTokensAtOnce, [&](size_t part) {
    PrepareValues(made[part / kParts], part % kParts * kTokensAtOnce);
  });
  const float* bias = call.bias.As<const float>();
  context.ParallelFor(tiles * panels, [&](size_t task) {
    const int64_t number = task % tiles;
    float* y = call.y.As<float>() + number * kTokenTile * call.outputs;
    MultiplyPanel(weight, made[number], static_cast<int64_t>(task) / tiles * width, bias, y);
  });
}

template <class Format>
void Multiply(const KernelContext& context, const Allocator& allocator, const RowLinearCall& call,
              const Format& weight) {
  if (call.y.Count() == 0) return;
  if (call.tokens <= (MultipliesBytes(weight) ? kTokensByDigits : kFewTokens)) {
    MultiplyFew(context, allocator, call, weight);
  } else {
    MultiplyMany(context, allocator, call, weight);
  }
}

class RowLinearCpu : public Kernel {
 public:
  explicit RowLinearCpu(const KernelInfo& info) : allocator_(info) {}

  void Compute(const KernelContext& context) override {
    const RowLinearCall call(context);
    Multiply(context, allocator_, call, FloatFormat{call.weight.As<const float>(), call.outputs});
  }

 private:
  const Allocator allocator_;
};

template <int kBits>
class RowLinearCodesCpu : public Kernel {
 public:
  explicit RowLinearCodesCpu(const KernelInfo& info)
      : allocator_(info), layout_(info, kBits), largest_scales_(info, RowLinearCall::kScales) {}

  void Compute(const KernelContext& context) override {
    const RowLinearCall call(context, layout_);
    CodeFormat<kBits> weight(layout_, call.weight, call.scales, call.zero_points);
    std::shared_ptr<const LargestScales> largest;
    if (call.tokens <= kTokensByDigits && MultipliesBytes(weight)) largest = largest_scales_.Of(call.scales);
    weight.largest = largest.get();
    Multiply(context, allocator_, call, weight);
  }

 private:
  const Allocator allocator_;
  const CodeLayout layout_;
  const LargestScalesOf largest_scales_;
};

}  // namespace

std::vector<OpDefinition> RowLinearOnCpu() {
  const std::vector<IoType> of_codes = RowLinearInputs({{kFloat}}, kFloat, CodeTypes());
  return {
      {"RowLinear", nullptr, RowLinearInputs({{kFloat}}, kFloat, {{kFloat}}), {{kFloat}}, Create<RowLinearCpu>},
      {"RowLinear4", nullptr, of_codes, {{kFloat}}, Create<RowLinearCodesCpu<4>>},
      {"RowLinear8", nullptr, of_codes, {{kFloat}}, Create<RowLinearCodesCpu<8>>},
  };
}

}  // namespace tda
