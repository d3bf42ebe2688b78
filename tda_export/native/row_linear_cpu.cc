// tda::RowLinear and its forms for integers on the CPU, float32 activations; and NormRowLinear and GatedRowLinear with
// theirs, whose x each task makes for itself.
//
// A few tokens are computed one by one, or share the codes that they read: ONNX Runtime's thread pool gets chunks of rows
// (row_sums_cpu.h) in tiles of columns, and the thread that ends the last chunk of a tile adds the chunks up. Many tokens
// are computed as a product of matrices (row_panels_cpu.h), whose panels of columns are distributed over threads.
#include "row_linear_cpu.h"

#include <algorithm>
#include <atomic>
#include <optional>

#include "activation.h"
#include "gated.h"
#include "gated_cpu.h"
#include "norm_cpu.h"
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

// Where x [tokens, inputs] comes from:
//
//   kStored           whether it is in memory as a whole
//   Stored()          where
//   Make(token, first, end, once, x)  otherwise: write rows [first, end) of a token to x + first. `once`: no other call has
//                     made or will make the same rows with it, so that what else is to be stored of them is stored
struct StoredInputs {
  static constexpr bool kStored = true;

  const float* Stored() const { return x; }
  void Make(int64_t, int64_t, int64_t, bool, float*) const {}

  const float* x;
};

struct NormedInputs {
  static constexpr bool kStored = false;

  const float* Stored() const { return nullptr; }

  // Every task adds all squares by itself, so that none waits for another.
  void Make(int64_t token, int64_t first, int64_t end, bool once, float* made) const {
    const int64_t row = token * inputs, at = row + first;
    const float scale = NormScaleOf(x + row, residual + row, inputs, epsilon);
    NormSums(x + at, residual + at, weight + first, end - first, scale, made + first, once ? sum + at : nullptr);
  }

  const float* x;
  const float* residual;
  const float* weight;  // of the norm
  float* sum;
  int64_t inputs;
  float epsilon;
};

struct GatedInputs {
  static constexpr bool kStored = false;

  const float* Stored() const { return nullptr; }

  void Make(int64_t token, int64_t first, int64_t end, bool, float* made) const {
    const int64_t at = token * stride + first;
    MultiplyGated(activation, gate + at, up + at, end - first, made + first);
  }

  const float* gate;
  const float* up;
  int64_t stride;
  Activation activation;
};

// Memory for what a thread makes.
float* ThreadMemory(int64_t floats) {
  thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < floats) memory.resize(floats);
  return memory.data();
}

RowPrices PricesOf(const RowLinearCall& call) {
  return {call.row_price.As<const float>(), *call.price.As<const float>()};
}

template <class Format, class Inputs>
void MultiplyFew(const KernelContext& context, const Allocator& allocator, const RowLinearCall& call,
                 const Format& weight, const Inputs& inputs) {
  const RowChunks<Format> chunks(weight, call.inputs, context.Threads());
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
    const int64_t first_row = chunks.FirstRow(chunk), end_row = chunks.FirstRow(chunk + 1);
    const float* x = inputs.Stored();
    if constexpr (!Inputs::kStored) {
      float* const made = ThreadMemory(call.tokens * call.inputs);
      for (int64_t t = 0; t < call.tokens; ++t) inputs.Make(t, first_row, end_row, tile == 0, made + t * call.inputs);
      x = made;
    }
    SumChunk(weight, {x, call.tokens, call.inputs, prices, first_row, end_row, begin, end, sums + chunk * stride,
                      token_stride});
    if (ended[tile].fetch_add(1) + 1 < chunks.count) return;
    const float* bias = call.bias.present ? call.bias.As<const float>() + begin : nullptr;
    for (int64_t t = 0; t < call.tokens; ++t) {
      float* y = call.y.As<float>() + t * call.outputs + begin;
      AddChunks(weight, sums + t * token_stride, chunks.count, stride, end - begin, bias, y);
    }
  });
}

template <class Format, class Inputs>
void MultiplyMany(const KernelContext& context, const Allocator& allocator, const RowLinearCall& call,
                  const Format& weight, const Inputs& inputs) {
  const float* x = inputs.Stored();
  std::optional<Scratch> made_inputs;
  if constexpr (!Inputs::kStored) {
    made_inputs.emplace(context, allocator, call.tokens * call.inputs * sizeof(float), false);
    float* const made_x = made_inputs->As<float>();
    context.ParallelFor(call.tokens, [&](size_t token) {
      inputs.Make(token, 0, call.inputs, true, made_x + token * call.inputs);
    });
    x = made_x;
  }
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
    tile.x = x + first * call.inputs;
    tile.tokens = std::min(kTokenTile, call.tokens - first);
    tile.inputs = call.inputs;
    tile.prices = PricesOf(call);
    tile.chunks = RowChunks<Format>(weight, call.inputs, 1).count;
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

template <class Format, class Inputs>
void Multiply(const KernelContext& context, const Allocator& allocator, const RowLinearCall& call,
              const Format& weight, const Inputs& inputs) {
  if (call.tokens == 0) return;
  if (call.outputs == 0) {  // a norm still has its sum
    for (int64_t t = 0; t < call.tokens; ++t) inputs.Make(t, 0, call.inputs, true, ThreadMemory(call.inputs));
    return;
  }
  if (call.tokens <= (MultipliesBytes(weight) ? kTokensByDigits : kFewTokens)) {
    MultiplyFew(context, allocator, call, weight, inputs);
  } else {
    MultiplyMany(context, allocator, call, weight, inputs);
  }
}

// A node's matrix, of elements (kBits 0) or codes.
template <int kBits>
class RowMatrix {
 public:
  RowMatrix(const KernelInfo& info, size_t ahead)
      : allocator_(info), layout_(info, kBits), largest_scales_(info, ahead + RowLinearCall::kScales - 1) {}

  RowLinearCall Read(const KernelContext& context, const InputsAhead& ahead) const {
    return RowLinearCall(context, layout_, ahead);
  }

  template <class Inputs>
  void MultiplyBy(const KernelContext& context, const RowLinearCall& call, const Inputs& inputs) const {
    CodeFormat<kBits> weight(layout_, call.weight, call.scales, call.zero_points);
    std::shared_ptr<const LargestScales> largest;
    if (call.tokens <= kTokensByDigits && MultipliesBytes(weight)) largest = largest_scales_.Of(call.scales);
    weight.largest = largest.get();
    Multiply(context, allocator_, call, weight, inputs);
  }

 private:
  const Allocator allocator_;
  const CodeLayout layout_;
  const LargestScalesOf largest_scales_;
};

template <>
class RowMatrix<0> {
 public:
  RowMatrix(const KernelInfo& info, size_t) : allocator_(info) {}

  RowLinearCall Read(const KernelContext& context, const InputsAhead& ahead) const { return RowLinearCall(context, ahead); }

  template <class Inputs>
  void MultiplyBy(const KernelContext& context, const RowLinearCall& call, const Inputs& inputs) const {
    Multiply(context, allocator_, call, FloatFormat{call.weight.As<const float>(), call.outputs}, inputs);
  }

 private:
  const Allocator allocator_;
};

template <int kBits>
class RowLinearCpu : public Kernel {
 public:
  explicit RowLinearCpu(const KernelInfo& info) : matrix_(info, 1) {}

  void Compute(const KernelContext& context) override {
    const RowLinearCall call = matrix_.Read(context, {});
    matrix_.MultiplyBy(context, call, StoredInputs{call.x.As<const float>()});
  }

 private:
  const RowMatrix<kBits> matrix_;
};

// x, residual, norm_weight, then RowLinear's inputs after x; outputs y and sum.
template <int kBits>
class NormRowLinearCpu : public Kernel {
 public:
  explicit NormRowLinearCpu(const KernelInfo& info) : epsilon_(info.Float("epsilon")), matrix_(info, 3) {}

  void Compute(const KernelContext& context) override {
    const RowLinearCall call = matrix_.Read(context, {3, "x", 1});
    const Tensor residual = context.Input(1), weight = context.Input(2);
    CheckNorm(call, residual, weight);
    const Tensor sum = context.OutputLike(1, call.x);
    matrix_.MultiplyBy(context, call, NormedInputs{call.x.As<const float>(), residual.As<const float>(),
                                                   weight.As<const float>(), sum.As<float>(), call.inputs, epsilon_});
  }

 private:
  const float epsilon_;
  const RowMatrix<kBits> matrix_;
};

// gate and up, or both side by side, then RowLinear's inputs after x.
template <int kBits>
class GatedRowLinearCpu : public Kernel {
 public:
  explicit GatedRowLinearCpu(const KernelInfo& info)
      : activation_(ParseActivation(info.String("activation"))), matrix_(info, 2) {}

  void Compute(const KernelContext& context) override {
    const GatedCall gated(context);
    const RowLinearCall call = matrix_.Read(context, {2, "gate", gated.up.present ? 1 : 2});
    const GatedInputs inputs = {gated.gate.As<const float>(), gated.Up<float>(), gated.stride, activation_};
    matrix_.MultiplyBy(context, call, inputs);
  }

 private:
  const Activation activation_;
  const RowMatrix<kBits> matrix_;
};

template <int kBits>
void Define(std::vector<OpDefinition>& definitions, const char* plain, const char* norm, const char* gated) {
  const std::vector<IoType> weight = kBits > 0 ? CodeTypes() : std::vector<IoType>{{kFloat}};
  const auto define = [&](const char* name, std::vector<IoType> ahead, size_t outputs, KernelFactory create) {
    definitions.emplace_back(name, nullptr, RowLinearInputs(std::move(ahead), kFloat, weight),
                             std::vector<IoType>(outputs, {kFloat}), create);
  };
  define(plain, {{kFloat}}, 1, Create<RowLinearCpu<kBits>>);
  define(norm, {{kFloat}, {kFloat}, {kFloat}}, 2, Create<NormRowLinearCpu<kBits>>);
  define(gated, {{kFloat}, {kFloat, true}}, 1, Create<GatedRowLinearCpu<kBits>>);
}

}  // namespace

std::vector<OpDefinition> RowLinearOnCpu() {
  std::vector<OpDefinition> definitions;
  Define<0>(definitions, "RowLinear", "NormRowLinear", "GatedRowLinear");
  Define<4>(definitions, "RowLinear4", "NormRowLinear4", "GatedRowLinear4");
  Define<8>(definitions, "RowLinear8", "NormRowLinear8", "GatedRowLinear8");
  return definitions;
}

}  // namespace tda
