// tda::RowLinear, RowLinear4 and RowLinear8 on CUDA.
#include "row_linear_cuda.h"

#include <utility>

#include "row_product_cuda.h"

namespace tda {
namespace {

template <ElementType kType, int kBits>
class RowLinearCuda : public Kernel {
 public:
  explicit RowLinearCuda(const KernelInfo& info) : product_(info, kType, kBits) {}

  void Compute(const KernelContext& context) override {
    const RowLinearCall call = product_.Read(context);
    product_.Multiply(context, call, call.x.data);
  }

 private:
  const RowProduct product_;
};

template <ElementType kType>
void Define(std::vector<OpDefinition>& definitions) {
  auto define = [&](const char* name, std::vector<IoType> weight, KernelFactory create) {
    definitions.emplace_back(name, kCudaProvider, RowLinearInputs({{kType}}, kType, std::move(weight)),
                             std::vector<IoType>{{kType}}, create);
  };
  define("RowLinear", {{kType}}, Create<RowLinearCuda<kType, 0>>);
  define("RowLinear4", CodeTypes(), Create<RowLinearCuda<kType, 4>>);
  define("RowLinear8", CodeTypes(), Create<RowLinearCuda<kType, 8>>);
}

}  // namespace

std::vector<OpDefinition> RowLinearOnCuda() {
  std::vector<OpDefinition> definitions;
  Define<kHalf>(definitions);
  Define<kBfloat16>(definitions);
  return definitions;
}

}  // namespace tda
