#include "many_tokens_cuda.h"

#include <algorithm>

namespace tda {
namespace {

constexpr int64_t kElementBytes = 2;
constexpr int64_t kTileTokens = 128, kTileOutputs = 256;  // of a block of cuBLAS's, about
constexpr int64_t kMostExpandedBytes = 128 << 20;         // unless a tile's outputs have more
constexpr int64_t kExpandedTogether = 4;                  // rows of a thread (device/expand.cu)

struct ExpandArguments {
  StoredMatrix matrix;
  void* elements;
  int first_row, first_column;
  int rows, columns;
};

struct KeepArguments {
  const void* x;
  const float* row_price;
  const float* price;
  void* kept;
  const void* bias;
  void* y;
  int tokens, inputs, outputs;
};

}  // namespace

ManyTokens::ManyTokens(const KernelInfo& info, ElementType type, int bits)
    : allocator_(info), type_(type), bits_(bits), multiprocessors_(CudaDevice::Current().multiprocessors) {
  const CudaModule& module = CudaModule::Get("expand", FormatDefines(type, bits));
  for (const bool wide : {false, true}) {
    expand_[wide] = module.Kernel(wide ? "Expand_8" : "Expand_1", kThreads);
    keep_[wide] = module.Kernel(wide ? "Keep_8" : "Keep_1", kThreads);
  }
}

// How many outputs are expanded and multiplied together: as many as memory allows, or fewer if blocks of cuBLAS fill the GPU
// in fewer rounds then.
int64_t ManyTokens::OutputsAtOnce(const ManyTokensCall& call) const {
  const int64_t bytes = call.inputs * kElementBytes;  // of an output
  const int64_t tiles = CeilDivide(call.tokens, kTileTokens);
  const auto rounds = [&](int64_t outputs) {
    return CeilDivide(tiles * CeilDivide(outputs, kTileOutputs), multiprocessors_);
  };
  int64_t best = 0, least = 0;
  for (int64_t each = kTileOutputs;; each += kTileOutputs) {
    const int64_t total = call.outputs / each * rounds(each) + rounds(call.outputs % each);
    if (best == 0 || total <= least) best = each, least = total;
    if (each >= call.outputs || (each + kTileOutputs) * bytes > kMostExpandedBytes) break;
  }
  return std::min(best, call.outputs);
}

// Copy x without the inputs that are not worth their price.
void ManyTokens::Keep(void* stream, const ManyTokensCall& call, void* kept) const {
  const KeepArguments arguments = {call.x,
                                   call.row_price,
                                   call.price,
                                   kept,
                                   call.bias,
                                   call.y,
                                   static_cast<int>(call.tokens),
                                   static_cast<int>(call.inputs),
                                   static_cast<int>(call.outputs)};
  const auto suits = [](const void* data, int64_t count) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && count % kWide == 0;
  };
  const bool bias_suits = call.bias == nullptr || (suits(call.bias, call.outputs) && suits(call.y, 0));
  const bool wide = suits(call.x, call.inputs) && bias_suits;
  const CudaKernel& kernel = keep_[wide];
  const int64_t blocks = CeilDivide(call.inputs, kThreads * (wide ? kWide : 1));
  const int64_t tokens_together = std::max<int64_t>(1, 2 * kernel.resident_blocks / blocks);
  kernel.Launch(stream, blocks, std::min({call.tokens, tokens_together, kMostBlocks}), 1, kThreads, &arguments);
}

void ManyTokens::Multiply(const KernelContext& context, const ManyTokensCall& call) const {
  void* stream = context.CudaStream();
  const bool expands = bits_ > 0;
  const bool keeps = call.price != nullptr && !(call.every_row && call.bias == nullptr);
  const int64_t at_once = expands ? OutputsAtOnce(call) : call.outputs;
  const size_t kept_bytes = keeps ? Aligned(call.tokens * call.inputs * kElementBytes) : 0;
  const size_t expanded_bytes = expands ? at_once * call.inputs * kElementBytes : 0;
  const Scratch scratch(context, allocator_, std::max<size_t>(1, kept_bytes + expanded_bytes), true);
  MatrixProduct product = {};
  product.type = type_;
  product.output_major = call.output_major;
  product.add = call.bias != nullptr;
  product.x = call.x;
  product.tokens = call.tokens;
  product.inputs = call.inputs;
  product.y_stride = call.outputs;
  if (keeps) {
    product.x = scratch.As<void>();
    Keep(stream, call, scratch.As<void>());
  }
  for (int64_t first = 0; first < call.outputs; first += at_once) {
    product.outputs = std::min(at_once, call.outputs - first);
    product.y = static_cast<char*>(call.y) + first * kElementBytes;
    product.matrix = call.matrix.weights;
    if (expands) {
      product.matrix = scratch.As<void>(kept_bytes);
      Expand(stream, call, first, product.outputs, scratch.As<void>(kept_bytes));
    }
    cublas_.Multiply(context, product);
  }
}

// Write the elements of some outputs as a matrix of their own.
void ManyTokens::Expand(void* stream, const ManyTokensCall& call, int64_t first, int64_t count, void* elements) const {
  ExpandArguments arguments = {call.matrix, elements};
  arguments.first_row = static_cast<int>(call.output_major ? first : 0);
  arguments.first_column = static_cast<int>(call.output_major ? 0 : first);
  arguments.rows = static_cast<int>(call.output_major ? count : call.inputs);
  arguments.columns = static_cast<int>(call.output_major ? call.inputs : count);
  const bool wide = SuitsLoads(call.matrix, kWide, bits_);
  const int64_t blocks = CeilDivide(arguments.columns, kThreads * (wide ? kWide : 1));
  const int64_t together = wide ? CeilDivide(arguments.rows, kExpandedTogether) : arguments.rows;
  expand_[wide].Launch(stream, blocks, std::min(together, kMostBlocks), 1, kThreads, &arguments);
}

}  // namespace tda
