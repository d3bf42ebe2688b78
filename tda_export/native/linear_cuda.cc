// tda::Linear, tda::Linear4, tda::Linear8, tda::AddNorm and tda::AddBiasNorm on CUDA (device/linear.cu).
#include "linear_cuda.h"

#include <algorithm>
#include <optional>

#include "many_tokens_cuda.h"
#include "norm_cuda.h"

namespace tda {
namespace {

constexpr int64_t kRowsAtOnce = 2;

CudaKernel LinearKernel(ElementType type, int bits, const std::string& name, int64_t threads) {
  return CudaModule::Get("linear", FormatDefines(type, bits)).Kernel(name.c_str(), static_cast<int>(threads));
}

struct LinearArguments {
  const void* x;
  StoredMatrix weight;
  void* y;
  int tokens, inputs, outputs;
  int early;
};

template <ElementType kType, int kBits>
class Linear : public Kernel {
 public:
  explicit Linear(const KernelInfo& info) : early_(info.Flag("early")), many_tokens_(info, kType, kBits) {
    if constexpr (kBits > 0) layout_.emplace(info, kBits);
    auto add = [&](bool tile, int width) {
      const std::string name = std::string("Linear") + (tile ? "_4_" : "_1_") + std::to_string(width);
      kernels_[tile].push_back({LinearKernel(kType, kBits, name, kThreads), width});
    };
    // The widest loads come first.
    if (kBits == 4) add(false, 32);
    if (kBits > 0) add(false, 16);
    for (const bool tile : {false, true}) {
      for (const int width : {8, 1}) add(tile, width);
    }
  }

  void Compute(const KernelContext& context) override {
    const Tensor x = context.Input(0), weight = context.Input(1);
    StoredMatrix matrix;
    if constexpr (kBits > 0) {
      const Tensor scales = context.Input(2), zero_points = context.Input(3);
      layout_->Check(weight, scales, zero_points);
      matrix = StoredCodes(*layout_, weight, scales, zero_points);
    } else {
      if (weight.rank != 2) Fail("weight: expected shape [outputs, inputs], got ", weight.Shape());
      matrix = StoredElements(weight);
    }
    const int64_t outputs = weight.sizes[0], inputs = matrix.columns;
    if (x.rank == 0 || x.sizes[x.rank - 1] != inputs) {
      Fail("x: expected shape [.., ", inputs, "], as w has ", inputs, " columns, got ", x.Shape());
    }
    if (inputs == 0) Fail("weight: a product of no inputs, shape ", weight.Shape());
    Tensor shape = x;
    shape.sizes[shape.rank - 1] = outputs;
    const Tensor y = context.OutputLike(0, shape);
    const int64_t tokens = x.Count() / inputs;
    if (tokens == 0 || outputs == 0) return;
    if (many_tokens_.Pays(tokens)) {
      many_tokens_.Multiply(context, {x.data, matrix, true, tokens, inputs, outputs, y.data});
      return;
    }
    const CudaKernel& kernel = Choose(tokens, x, matrix);
    const int64_t blocks = std::min(CeilDivide(outputs, kWarps * kRowsAtOnce), int64_t{kernel.resident_blocks});
    const int64_t tiles = tokens == 1 ? 1 : CeilDivide(tokens, kTile);
    const LinearArguments arguments = {x.data,
                                       matrix,
                                       y.data,
                                       static_cast<int>(tokens),
                                       static_cast<int>(inputs),
                                       static_cast<int>(outputs),
                                       early_};
    kernel.Launch(context.CudaStream(), blocks, tiles, 1, kThreads, &arguments);
  }

 private:
  const CudaKernel& Choose(int64_t tokens, const Tensor& x, const StoredMatrix& matrix) const {
    const std::vector<std::pair<CudaKernel, int64_t>>& kernels = kernels_[tokens > 1];
    for (const auto& [kernel, width] : kernels) {
      if (SuitsWideLoads(x) && SuitsLoads(matrix, width, kBits == 0 ? 16 : kBits)) return kernel;
    }
    return kernels.back().first;
  }

  const bool early_;
  const ManyTokens many_tokens_;
  std::optional<CodeLayout> layout_;                            // where there are codes
  std::vector<std::pair<CudaKernel, int64_t>> kernels_[2];  // by tile of tokens; each with the columns of a load
};

template <ElementType kType>
class AddNorm : public Kernel {
 public:
  explicit AddNorm(const KernelInfo& info) : norm_(info, kType) {}

  void Compute(const KernelContext& context) override {
    const NormTensors tensors = {context.Input(0), context.Input(1), context.Input(2), context.Input(3)};
    const int64_t hidden = tensors.weight.Count();
    const Tensor& x = tensors.x;
    if (x.rank == 0 || x.sizes[x.rank - 1] != hidden) {
      Fail("x: expected shape [.., ", hidden, "], got ", x.Shape());
    }
    tensors.Check();
    const Tensor normed = context.OutputLike(0, x), sum = context.OutputLike(1, x);
    norm_.Launch(context, tensors, normed, sum);
  }

 private:
  const NormKernels norm_;
};

template <ElementType kType>
void Define(std::vector<OpDefinition>& definitions) {
  auto define = [&](const char* name, std::vector<IoType> inputs, size_t outputs, KernelFactory create) {
    inputs.insert(inputs.begin(), {kType});  // x
    definitions.emplace_back(name, kCudaProvider, std::move(inputs), std::vector<IoType>(outputs, {kType}), create);
  };
  define("Linear", {{kType}}, 1, Create<Linear<kType, 0>>);
  define("Linear4", CodeTypes(), 1, Create<Linear<kType, 4>>);
  define("Linear8", CodeTypes(), 1, Create<Linear<kType, 8>>);
  define("AddNorm", {{kType}, {kType}}, 2, Create<AddNorm<kType>>);  // residual, weight
  define("AddBiasNorm", {{kType}, {kType}, {kType}}, 2, Create<AddNorm<kType>>);
}

}  // namespace

std::vector<OpDefinition> LinearOnCuda() {
  std::vector<OpDefinition> definitions;
  Define<kHalf>(definitions);
  Define<kBfloat16>(definitions);
  return definitions;
}

}  // namespace tda
