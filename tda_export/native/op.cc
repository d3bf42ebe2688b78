#include "op.h"

#include <exception>
#include <utility>

namespace tda {
namespace {

const OpDefinition& Definition(const OrtCustomOp* op) { return *static_cast<const OpDefinition*>(op); }

int Characteristic(const IoType& tensor) { return tensor.variadic ? kVariadic : int{tensor.optional}; }

// A kernel with the data that its calls need.
struct Instance {
  const OrtApi* api;
  const char* name;
  std::unique_ptr<Kernel> kernel;
  std::vector<Tensor> constants;  // by input, on the CPU: to ask ONNX Runtime for each in every call takes time
};

// Run `work`; a thrown error becomes a status that names the operator.
template <class Work>
OrtStatus* Guard(const OrtApi* api, const char* name, const Work& work) {
  try {
    work();
    return nullptr;
  } catch (const std::exception& error) {
    return api->CreateStatus(kOrtFail, (std::string("tda::") + name + ": " + error.what()).c_str());
  }
}

OrtStatus* CreateInstance(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
  const OpDefinition& definition = Definition(op);
  return Guard(api, definition.name, [&] {
    const KernelInfo node(api, info);
    auto instance = std::make_unique<Instance>(Instance{api, definition.name, definition.create(node), {}});
    // On CUDA steps are captured, so nothing is asked in every one.
    const size_t known = definition.provider == nullptr ? definition.inputs.size() : 0;
    for (size_t i = 0; i < known; ++i) instance->constants.push_back(node.Constant(i));
    *kernel = instance.release();
  });
}

OrtStatus* ComputeInstance(void* kernel, OrtKernelContext* context) {
  const Instance& instance = *static_cast<Instance*>(kernel);
  return Guard(instance.api, instance.name, [&] { instance.kernel->Compute(KernelContext(instance.api, context, instance.constants)); });
}

}  // namespace

OpDefinition::OpDefinition(const char* name, const char* provider, std::vector<IoType> inputs,
                           std::vector<IoType> outputs, KernelFactory create)
    : OrtCustomOp{},
      name(name),
      provider(provider),
      inputs(std::move(inputs)),
      outputs(std::move(outputs)),
      create(create) {
  version = kOrtApiVersion;
  GetName = [](const OrtCustomOp* op) { return Definition(op).name; };
  GetExecutionProviderType = [](const OrtCustomOp* op) { return Definition(op).provider; };
  GetInputType = [](const OrtCustomOp* op, size_t i) { return int{Definition(op).inputs[i].type}; };
  GetInputTypeCount = [](const OrtCustomOp* op) { return Definition(op).inputs.size(); };
  GetInputCharacteristic = [](const OrtCustomOp* op, size_t i) { return Characteristic(Definition(op).inputs[i]); };
  GetOutputType = [](const OrtCustomOp* op, size_t i) { return int{Definition(op).outputs[i].type}; };
  GetOutputTypeCount = [](const OrtCustomOp* op) { return Definition(op).outputs.size(); };
  GetOutputCharacteristic = [](const OrtCustomOp* op, size_t i) { return Characteristic(Definition(op).outputs[i]); };
  GetInputMemoryType = [](const OrtCustomOp* op, size_t i) { return Definition(op).inputs[i].on_host ? kHostMemory : 0; };
  GetVariadicInputMinArity = GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  GetVariadicInputHomogeneity = GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  CreateKernelV2 = CreateInstance;
  KernelComputeV2 = ComputeInstance;
  KernelDestroy = [](void* kernel) { delete static_cast<Instance*>(kernel); };
}

}  // namespace tda
