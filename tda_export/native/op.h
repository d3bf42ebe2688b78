// An operator as a table row: name, provider, types, and a kernel class. op.cc adapts it to ONNX Runtime's ABI.
#pragma once

#include <memory>
#include <vector>

#include "ort.h"

namespace tda {

class Kernel {
 public:
  virtual ~Kernel() = default;
  virtual void Compute(const KernelContext& context) = 0;
};

struct IoType {
  ElementType type;
  bool optional = false;
  bool on_host = false;   // an input that kernels of any provider read on the CPU
  bool variadic = false;  // any number of tensors, at least one; the last of the inputs or outputs
};

using KernelFactory = std::unique_ptr<Kernel> (*)(const KernelInfo& info);

// Make a kernel class's factory: Create<SomeKernel>.
template <class SomeKernel>
std::unique_ptr<Kernel> Create(const KernelInfo& info) {
  return std::make_unique<SomeKernel>(info);
}

// Several definitions may share a name where their types or providers differ.
struct OpDefinition : OrtCustomOp {
  OpDefinition(const char* name, const char* provider, std::vector<IoType> inputs, std::vector<IoType> outputs,
               KernelFactory create);

  const char* name;
  const char* provider;  // null is the CPU
  std::vector<IoType> inputs;
  std::vector<IoType> outputs;
  KernelFactory create;
};

}  // namespace tda
