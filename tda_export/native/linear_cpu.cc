// tda::Linear4 and tda::Linear8 on the CPU: products with rows of codes, float32 activations. ONNX Runtime's thread pool
// gets ranges of rows.
#include "linear_cpu.h"

#include <algorithm>

#include "digit_dots_cpu.h"

namespace tda {
namespace {

enum Input : size_t { kX, kWeight, kScales, kZeroPoints };

constexpr int64_t kRangeBytes = 256 << 10;  // of weights, about

#define TDA_DOTS(attribute, lanes, bits)                                                                    \
  attribute void PrepareToken(const CodeFormat<bits>& weight, const float* x, int64_t token,                \
                              const DotInputs& inputs) {                                                    \
    PrepareTokenOf<lanes>(weight, x, token, inputs);                                                        \
    if (inputs.ByDigits()) PrepareDigitsOf<lanes>(weight, x, token, inputs);                                \
  }                                                                                                         \
  attribute void DotRows(const CodeFormat<bits>& weight, int64_t begin, int64_t end, const DotInputs& inputs, \
                         float* y) {                                                                        \
    DotRowsOf<lanes>(weight, begin, end, inputs, y);                                                        \
  }
#define TDA_ALL_DOTS(attribute, lanes) \
  TDA_DOTS(attribute, lanes, 4)        \
  TDA_DOTS(attribute, lanes, 8)
TDA_FOR_EACH_TARGET(TDA_ALL_DOTS)

template <int kBits>
class LinearCpu : public Kernel {
 public:
  explicit LinearCpu(const KernelInfo& info) : allocator_(info), layout_(info, kBits) {}

  void Compute(const KernelContext& context) override {
    const Tensor x = context.Input(kX), codes = context.Input(kWeight);
    const Tensor scales = context.Input(kScales), zero_points = context.Input(kZeroPoints);
    layout_.Check(codes, scales, zero_points);
    if (x.rank == 0 || x.sizes[x.rank - 1] != layout_.columns) {
      Fail("x: expected shape [.., ", layout_.columns, "], as w has ", layout_.columns, " columns, got ", x.Shape());
    }
    const CodeFormat<kBits> weight(layout_, codes, scales, zero_points);
    Tensor shape = x;
    shape.sizes[shape.rank - 1] = weight.rows;
    const Tensor y = context.OutputLike(0, shape);
    if (y.Count() == 0) return;

    DotInputs inputs(layout_, x.Count() / layout_.columns);
    const Scratch scratch(context, allocator_, inputs.Bytes(), false);
    inputs.Place(scratch.As<float>());
    context.ParallelFor(inputs.tokens, [&](size_t t) {
      PrepareToken(weight, x.As<const float>() + t * layout_.columns, t, inputs);
    });
    const int64_t ranges = std::clamp<int64_t>(weight.rows * weight.RowBytes() / kRangeBytes, 1, weight.rows);
    context.ParallelFor(ranges, [&](size_t range) {
      const int64_t number = static_cast<int64_t>(range);
      DotRows(weight, number * weight.rows / ranges, (number + 1) * weight.rows / ranges, inputs, y.As<float>());
    });
  }

 private:
  const Allocator allocator_;
  const CodeLayout layout_;
};

}  // namespace

std::vector<OpDefinition> LinearOnCpu() {
  std::vector<IoType> inputs = {{kFloat}};
  for (const IoType& tensor : CodeTypes()) inputs.push_back(tensor);
  return {
      {"Linear4", nullptr, inputs, {{kFloat}}, Create<LinearCpu<4>>},
      {"Linear8", nullptr, inputs, {{kFloat}}, Create<LinearCpu<8>>},
  };
}

}  // namespace tda
