// tda::RowLinear on the CPU, float32: the needed rows are listed first, then read where they lie, each once for a tile of
// tokens.
//
// ONNX Runtime's thread pool gets ranges of columns. A column's sum is added row by row in order, so that a token's result
// depends neither on the number of threads nor on the other tokens of the call. A few rows are read at once while the next
// ones are asked for: where rows are skipped, the processor does not see ahead by itself.
#include "row_linear_cpu.h"

#include <algorithm>
#include <cstring>
#include <thread>

#include "row_linear.h"
#include "rows_cpu.h"

namespace tda {
namespace {

constexpr int64_t kTokenTile = 16;
constexpr int64_t kRangeBytes = 64 << 10;  // of weights, at least, so that handing out work costs little
constexpr int64_t kRangesPerThread = 2;    // evens out threads that are slowed down by others
constexpr int64_t kRangeStep = 64;         // columns: whole cache lines, and whole vectors

using Format = FloatFormat;

// The rows that a tile of tokens needs.
struct NeededRows {
  Format weight;
  const int32_t* rows;
  int64_t count;
  const float* values;  // [tokens, stride]: what a token multiplies each row with, 0 where it drops it
  int64_t stride;
  int64_t tokens;

  TDA_INLINE Format::Row At(int64_t i) const { return weight.At(rows[std::min(i, count - 1)]); }
};

template <int kLanes, int kCount>
TDA_INLINE void AddGroup(const NeededRows& needed, int64_t first, int64_t begin, int64_t end, float* y) {
  Format::Row rows[kCount], ahead[kCount];
  for (int r = 0; r < kCount; ++r) {
    rows[r] = needed.At(first + r);
    ahead[r] = needed.At(first + r + kGroupsAhead * kRowsAtOnce);
  }
  for (int64_t t = 0; t < needed.tokens; ++t) {
    const float* values = needed.values + t * needed.stride + first;
    AddScaled<kLanes, kCount>(y + t * needed.weight.columns, rows, ahead, begin, end, values);
  }
}

// Add the needed rows to y [tokens, columns], in the columns [begin, end).
template <int kLanes>
TDA_INLINE void AddNeededOf(const NeededRows& needed, int64_t begin, int64_t end, float* y) {
  int64_t i = 0;
  for (; i + kRowsAtOnce <= needed.count; i += kRowsAtOnce) AddGroup<kLanes, kRowsAtOnce>(needed, i, begin, end, y);
  for (; i < needed.count; ++i) AddGroup<kLanes, 1>(needed, i, begin, end, y);
}

#define TDA_ADD_NEEDED(attribute, lanes)                                                          \
  attribute void AddNeeded(const NeededRows& needed, int64_t begin, int64_t end, float* y) {      \
    AddNeededOf<lanes>(needed, begin, end, y);                                                    \
  }
TDA_FOR_EACH_TARGET(TDA_ADD_NEEDED)

// List the rows that some of the tokens x [tokens, inputs] need, and what each token multiplies them with, into values
// [tokens, inputs]. Returns how many there are.
int64_t ListNeeded(const float* x, int64_t tokens, int64_t inputs, const float* row_price, float price, int32_t* rows,
                   float* values) {
  int64_t count = 0;
  for (int64_t i = 0; i < inputs; ++i) {
    bool needed = false;
    for (int64_t t = 0; t < tokens; ++t) {
      const float value = x[t * inputs + i];
      const float own = value * value * row_price[i] < price ? 0.0f : value;  // less, not its opposite: NaN is kept
      values[t * inputs + count] = own;
      needed |= own != 0.0f;
    }
    rows[count] = static_cast<int32_t>(i);
    count += needed;
  }
  return count;
}

class RowLinearCpu : public Kernel {
 public:
  explicit RowLinearCpu(const KernelInfo& info)
      : allocator_(info), most_ranges_(kRangesPerThread * std::max(1u, std::thread::hardware_concurrency())) {}

  void Compute(const KernelContext& context) override {
    const RowLinearCall call(context);
    const int64_t inputs = call.inputs, outputs = call.outputs;
    if (call.y.Count() == 0) return;
    const int64_t tile_tokens = std::min(call.tokens, kTokenTile);
    const Scratch scratch(context, allocator_, inputs * (tile_tokens * sizeof(float) + sizeof(int32_t)), false);
    float* values = scratch.As<float>();
    int32_t* rows = scratch.As<int32_t>(inputs * tile_tokens * sizeof(float));
    for (int64_t start = 0; start < call.tokens; start += tile_tokens) {
      const int64_t tokens = std::min(tile_tokens, call.tokens - start);
      const int64_t count = ListNeeded(call.x.As<const float>() + start * inputs, tokens, inputs,
                                       call.row_price.As<const float>(), *call.price.As<const float>(), rows, values);
      const NeededRows needed = {{call.weight.As<const float>(), outputs}, rows, count, values, inputs, tokens};
      float* y = call.y.As<float>() + start * outputs;
      const int64_t bytes = std::max<int64_t>(count, 1) * outputs * int64_t{sizeof(float)} * tokens;
      const int64_t steps = (outputs + kRangeStep - 1) / kRangeStep;
      const int64_t ranges = std::clamp<int64_t>(bytes / kRangeBytes, 1, std::min(most_ranges_, steps));
      context.ParallelFor(ranges, [&](size_t range) {
        const int64_t begin = static_cast<int64_t>(range) * steps / ranges * kRangeStep;
        const int64_t end = std::min<int64_t>(static_cast<int64_t>(range + 1) * steps / ranges * kRangeStep, outputs);
        for (int64_t t = 0; t < tokens; ++t) {
          float* own = y + t * outputs + begin;
          if (call.bias.present) {
            std::memcpy(own, call.bias.As<const float>() + begin, (end - begin) * sizeof(float));
          } else {
            std::memset(own, 0, (end - begin) * sizeof(float));
          }
        }
        AddNeeded(needed, begin, end, y);
      });
    }
  }

 private:
  const Allocator allocator_;
  const int64_t most_ranges_;
};

}  // namespace

OpDefinition RowLinearOnCpu() {
  return OpDefinition("RowLinear", nullptr, RowLinearInputs(kFloat), {{kFloat}}, Create<RowLinearCpu>);
}

}  // namespace tda
