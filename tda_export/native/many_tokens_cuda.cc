#include "many_tokens_cuda.h"

#include <algorithm>

namespace tda {
namespace {

constexpr int64_t kScratchBytes = 64 << 20;  // of expanded elements, about
constexpr int64_t kOutputsTogether = 128;    // a whole number of groups
constexpr int64_t kElementBytes = 2;
constexpr int64_t kMostBlocks = 65535;  // along the grid's y

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
    : allocator_(info), type_(type), bits_(bits) {
  const CudaModule& module = CudaModule::Get("expand", FormatDefines(type, bits));
  keep_inputs_ = module.Kernel("KeepInputs", kThreads);
  for (const bool wide : {false, true}) expand_[wide] = module.Kernel(wide ? "Expand_8" : "Expand_1", kThreads);
}

void ManyTokens::Multiply(const KernelContext& context, const ManyTokensCall& call) const {
  void* stream = context.CudaStream();
  const bool expands = bits_ > 0, keeps = call.price != nullptr;
  int64_t at_once = call.outputs;
  if (expands) {
    const int64_t fit = kScratchBytes / (call.inputs * kElementBytes) / kOutputsTogether * kOutputsTogether;
    at_once = std::min(call.outputs, std::max(kOutputsTogether, fit));
  }
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
    const KeepArguments arguments = {call.x,
                                     call.row_price,
                                     call.price,
                                     scratch.As<void>(),
                                     call.bias,
                                     call.y,
                                     static_cast<int>(call.tokens),
                                     static_cast<int>(call.inputs),
                                     static_cast<int>(call.outputs)};
    keep_inputs_.Launch(stream, CeilDivide(call.inputs, kThreads), std::min(call.tokens, kMostBlocks), 1, kThreads,
                        &arguments);
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
  expand_[wide].Launch(stream, blocks, std::min<int64_t>(arguments.rows, kMostBlocks), 1, kThreads, &arguments);
}

}  // namespace tda
