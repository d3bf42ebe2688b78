// tda::Linear4 and tda::Linear8 on the CPU: products with rows of codes, float32 activations. ONNX Runtime's thread pool
// gets ranges of rows.
#include "linear_cpu.h"

#include <algorithm>

#include "digit_dots_cpu.h"
#include "norm_cpu.h"

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

// x, residual, norm_weight and, for AddBiasNorm, bias; outputs the norm of their sum, and the sum. The bits are those of
// products that make their own norm.
class AddNormCpu : public Kernel {
 public:
  explicit AddNormCpu(const KernelInfo& info) : epsilon_(info.Float("epsilon")) {}

  void Compute(const KernelContext& context) override {
    const Tensor x = context.Input(0), residual = context.Input(1), weight = context.Input(2), bias = context.Input(3);
    const int64_t columns = weight.Count();
    if (columns == 0 || x.rank == 0 || x.sizes[x.rank - 1] != columns) {
      Fail("x: expected shape [.., ", columns, "], got ", x.Shape());
    }
    if (residual.Count() != x.Count()) Fail("residual: expected shape ", x.Shape(), ", got ", residual.Shape());
    if (bias.present && bias.Count() != columns) Fail("bias: expected shape [", columns, "], got ", bias.Shape());
    const Tensor normed = context.OutputLike(0, x), sum = context.OutputLike(1, x);
    context.ParallelFor(x.Count() / columns, [&](size_t token) {
      const int64_t row = token * columns;
      const float* first = x.As<const float>() + row;
      const float* second = residual.As<const float>() + row;
      float* const norm = normed.As<float>() + row;
      if (bias.present) {
        for (int64_t i = 0; i < columns; ++i) norm[i] = first[i] + bias.As<const float>()[i];
        first = norm;
      }
      const float scale = NormScaleOf(first, second, columns, epsilon_);
      NormSums(first, second, weight.As<const float>(), columns, scale, norm, sum.As<float>() + row);
    });
  }

 private:
  const float epsilon_;
};

}  // namespace

std::vector<OpDefinition> LinearOnCpu() {
  std::vector<IoType> inputs = {{kFloat}};
  for (const IoType& tensor : CodeTypes()) inputs.push_back(tensor);
  return {
      {"Linear4", nullptr, inputs, {{kFloat}}, Create<LinearCpu<4>>},
      {"Linear8", nullptr, inputs, {{kFloat}}, Create<LinearCpu<8>>},
      {"AddNorm", nullptr, {{kFloat}, {kFloat}, {kFloat}}, {{kFloat}, {kFloat}}, Create<AddNormCpu>},
      {"AddBiasNorm", nullptr, {{kFloat}, {kFloat}, {kFloat}, {kFloat}}, {{kFloat}, {kFloat}}, Create<AddNormCpu>},
  };
}

}  // namespace tda
