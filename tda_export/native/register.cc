// The entry point that ONNX Runtime calls when the library is registered with a session's options.
#include "attention_cpu.h"
#include "attention_cuda.h"
#include "greedy.h"
#include "indexed_ffn_cpu.h"
#include "indexed_ffn_cuda.h"
#include "linear_cpu.h"
#include "linear_cuda.h"
#include "op.h"
#include "row_linear_cpu.h"
#include "row_linear_cuda.h"
#include "row_linear_fused_cuda.h"
#include "statistics_cuda.h"
#include "step_ops.h"
#include "subgraph_cpu.h"

namespace tda {
namespace {

const std::vector<OpDefinition>& Definitions() {
  static const std::vector<OpDefinition> definitions = [] {
    std::vector<OpDefinition> all = StatisticsOnCuda();
    for (const std::vector<OpDefinition>& some :
         {LinearOnCuda(), StepOps(), RowLinearOnCpu(), RowLinearOnCuda(), FusedRowLinearOnCuda(), LinearOnCpu(), AttentionOnCuda(),
          AttentionOnCpu()}) {
      all.insert(all.end(), some.begin(), some.end());
    }
    for (const OpDefinition& definition : {IndexedFfnOnCpu(), IndexedFfnOnCuda(kHalf), IndexedFfnOnCuda(kBfloat16),
                                           GreedyTokenOnCpu(), GreedyTokenOnCuda(), SubgraphOnCpu()}) {
      all.push_back(definition);
    }
    return all;
  }();
  return definitions;
}

OrtStatus* Register(OrtSessionOptions* options, const OrtApi* api) {
  // The domain must outlive every session, so it is made once. ONNX Runtime only reads it.
  static OrtCustomOpDomain* domain = nullptr;
  static OrtStatus* const failure = [api]() -> OrtStatus* {
    if (OrtStatus* status = api->CreateCustomOpDomain("tda", &domain)) return status;
    for (const OpDefinition& definition : Definitions()) {
      if (OrtStatus* status = api->CustomOpDomain_Add(domain, &definition)) return status;
    }
    return nullptr;
  }();
  if (failure != nullptr) return api->CreateStatus(kOrtFail, api->GetErrorMessage(failure));
  return api->AddCustomOpDomain(options, domain);
}

}  // namespace

const OpDefinition* OperatorOnCpu(const std::string& name) {
  for (const OpDefinition& definition : Definitions()) {
    if (definition.provider == nullptr && name == definition.name) return &definition;
  }
  return nullptr;
}

}  // namespace tda

#define TDA_EXPORT __attribute__((visibility("default")))

extern "C" TDA_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(tda::kOrtApiVersion);
  if (api == nullptr) return base->GetApi(1)->CreateStatus(tda::kOrtFail, "tda: ONNX Runtime 1.16 or newer is needed");
  return tda::Register(options, api);
}
