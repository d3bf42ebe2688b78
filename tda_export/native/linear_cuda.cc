// tda::Linear, tda::AddNorm and tda::AddBiasNorm on CUDA (device/linear.cu).
#include "linear_cuda.h"

#include <algorithm>

#include "cuda_module.h"
#include "indexed_ffn_device.h"

namespace tda {
namespace {

constexpr int64_t kRowsAtOnce = 2;
constexpr int64_t kNormThreads = 512;

template <ElementType kType>
CudaKernel LinearKernel(const std::string& name, int64_t threads) {
  const std::vector<std::string> defines = {"TDA_BF16=" + std::to_string(kType == kBfloat16)};
  return CudaModule::Get("linear", defines).Kernel(name.c_str(), static_cast<int>(threads));
}

struct LinearArguments {
  const void* x;
  const void* weight;
  void* y;
  int tokens, inputs, outputs;
  int early;
};

template <ElementType kType>
class Linear : public Kernel {
 public:
  explicit Linear(const KernelInfo& info) : early_(info.Flag("early")) {
    RequireDtype(kType);
    for (const bool tile : {false, true}) {
      for (const bool wide : {false, true}) {
        kernels_[tile][wide] =
            LinearKernel<kType>(std::string("Linear") + (tile ? "_4" : "_1") + (wide ? "_8" : "_1"), kThreads);
      }
    }
  }

  void Compute(const KernelContext& context) override {
    const Tensor x = context.Input(0), weight = context.Input(1);
    if (weight.rank != 2) Fail("weight: expected shape [outputs, inputs], got ", weight.Shape());
    const int64_t outputs = weight.sizes[0], inputs = weight.sizes[1];
    if (x.rank == 0 || x.sizes[x.rank - 1] != inputs) {
      Fail("x: expected shape [.., ", inputs, "], got ", x.Shape());
    }
    if (inputs == 0) Fail("weight: a product of no inputs, shape ", weight.Shape());
    Tensor shape = x;
    shape.sizes[shape.rank - 1] = outputs;
    const Tensor y = context.OutputLike(0, shape);
    const int64_t tokens = x.Count() / inputs;
    if (tokens == 0 || outputs == 0) return;
    const bool wide = inputs % kWide == 0 && SuitsWideLoads(x) && SuitsWideLoads(weight);
    const CudaKernel& kernel = kernels_[tokens > 1][wide];
    const int64_t blocks = std::min(CeilDivide(outputs, kWarps * kRowsAtOnce), int64_t{kernel.resident_blocks});
    const int64_t tiles = tokens == 1 ? 1 : CeilDivide(tokens, kTile);
    const LinearArguments arguments = {x.data,
                                       weight.data,
                                       y.data,
                                       static_cast<int>(tokens),
                                       static_cast<int>(inputs),
                                       static_cast<int>(outputs),
                                       early_};
    kernel.Launch(context.CudaStream(), blocks, tiles, 1, kThreads, &arguments);
  }

 private:
  const bool early_;
  CudaKernel kernels_[2][2];  // by tile of tokens and wide loads
};

struct AddNormArguments {
  const void* x;
  const void* residual;
  const void* bias;
  const void* weight;
  void* normed;
  void* sum;
  int hidden;
  float epsilon;
  int early;
};

template <ElementType kType>
class AddNorm : public Kernel {
 public:
  explicit AddNorm(const KernelInfo& info) : epsilon_(info.Float("epsilon")), early_(info.Flag("early")) {
    RequireDtype(kType);
    for (const bool wide : {false, true}) {
      kernels_[wide] = LinearKernel<kType>(wide ? "AddNorm_8" : "AddNorm_1", kNormThreads);
    }
  }

  void Compute(const KernelContext& context) override {
    const Tensor x = context.Input(0), residual = context.Input(1), weight = context.Input(2), bias = context.Input(3);
    const int64_t hidden = weight.Count();
    if (x.rank == 0 || x.sizes[x.rank - 1] != hidden) {
      Fail("x: expected shape [.., ", hidden, "], got ", x.Shape());
    }
    if (residual.Count() != x.Count()) Fail("residual: expected shape ", x.Shape(), ", got ", residual.Shape());
    if (bias.present && bias.Count() != hidden) Fail("bias: expected shape [", hidden, "], got ", bias.Shape());
    const Tensor normed = context.OutputLike(0, x), sum = context.OutputLike(1, x);
    if (x.Count() == 0) return;
    const bool wide = hidden % kWide == 0 && SuitsWideLoads(x) && SuitsWideLoads(residual) && SuitsWideLoads(weight) &&
                      SuitsWideLoads(bias) && SuitsWideLoads(normed) && SuitsWideLoads(sum);
    const AddNormArguments arguments = {x.data,      residual.data, bias.data,
                                        weight.data, normed.data,   sum.data,
                                        static_cast<int>(hidden),   epsilon_, early_};
    kernels_[wide].Launch(context.CudaStream(), x.Count() / hidden, 1, 1, kNormThreads, &arguments);
  }

 private:
  const float epsilon_;
  const bool early_;
  CudaKernel kernels_[2];  // by wide loads
};

}  // namespace

std::vector<OpDefinition> LinearOnCuda() {
  auto linear = [](ElementType type, KernelFactory create) {
    return OpDefinition("Linear", kCudaProvider, {{type}, {type}}, {{type}}, create);
  };
  auto add_norm = [](const char* name, ElementType type, bool bias, KernelFactory create) {
    std::vector<IoType> inputs = {{type}, {type}, {type}};  // x, residual, weight
    if (bias) inputs.push_back({type});
    return OpDefinition(name, kCudaProvider, inputs, {{type}, {type}}, create);
  };
  return {
      linear(kHalf, Create<Linear<kHalf>>),
      linear(kBfloat16, Create<Linear<kBfloat16>>),
      add_norm("AddNorm", kHalf, false, Create<AddNorm<kHalf>>),
      add_norm("AddNorm", kBfloat16, false, Create<AddNorm<kBfloat16>>),
      add_norm("AddBiasNorm", kHalf, true, Create<AddNorm<kHalf>>),
      add_norm("AddBiasNorm", kBfloat16, true, Create<AddNorm<kBfloat16>>),
  };
}

}  // namespace tda
