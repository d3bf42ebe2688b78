#include "indexed_ffn.h"

namespace tda {
namespace {

void Expect(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
  if (!tensor.present) return;
  Tensor expected;
  for (int64_t size : sizes) expected.sizes[expected.rank++] = size;
  bool same = tensor.rank == expected.rank;
  for (size_t axis = 0; same && axis < tensor.rank; ++axis) same = tensor.sizes[axis] == expected.sizes[axis];
  if (!same) Fail(name, ": expected shape ", expected.Shape(), ", got ", tensor.Shape());
}

}  // namespace

Activation ParseActivation(const std::string& name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  Fail("activation '", name, "' is not known; known are silu, gelu, gelu_tanh and relu");
}

std::vector<IoType> IndexedFfnInputs(ElementType type) {
  return {
      {type},          // x
      {kInt32},        // mask_indices
      {type, true},    // w_gate
      {type},          // w_up
      {type},          // w_down
      {type, true},    // b_gate
      {type, true},    // b_up
      {type, true},    // b_down
      {kFloat, true},  // neuron_scale
      {kFloat, true},  // token_thresholds
  };
}

IndexedFfnArguments::IndexedFfnArguments(const KernelContext& context, int64_t layer)
    : x(context.Input(kX)),
      mask_indices(context.Input(kMaskIndices)),
      gate(context.Input(kGate)),
      up(context.Input(kUp)),
      down(context.Input(kDown)),
      gate_bias(context.Input(kGateBias)),
      up_bias(context.Input(kUpBias)),
      down_bias(context.Input(kDownBias)),
      neuron_scale(context.Input(kNeuronScale)),
      token_thresholds(context.Input(kTokenThresholds)) {
  if (x.rank == 0) Fail("x: expected an axis of hidden size, got a scalar");
  if (up.rank != 2) Fail("w_up: expected shape [neurons, hidden size], got ", up.Shape());
  if (mask_indices.rank != 1) Fail("mask_indices: expected one axis, got shape ", mask_indices.Shape());
  hidden = x.sizes[x.rank - 1];
  neurons = up.sizes[0];
  indices = mask_indices.sizes[0];
  if (hidden == 0) Fail("x: the hidden size is 0");
  tokens = x.Count() / hidden;
  Expect(gate, "w_gate", {neurons, hidden});
  Expect(up, "w_up", {neurons, hidden});
  Expect(down, "w_down", {neurons, hidden});
  Expect(gate_bias, "b_gate", {neurons});
  Expect(up_bias, "b_up", {neurons});
  Expect(down_bias, "b_down", {hidden});
  Expect(neuron_scale, "neuron_scale", {neurons});
  if (gate_bias.present && !gate.present) Fail("b_gate: there is no w_gate");
  if (neuron_scale.present != token_thresholds.present) {
    Fail("neuron_scale and token_thresholds: one is missing; give both or neither");
  }
  if (token_thresholds.present &&
      (token_thresholds.rank != 1 || layer < 0 || layer >= token_thresholds.sizes[0])) {
    Fail("token_thresholds: layer ", layer, " has no entry in shape ", token_thresholds.Shape());
  }
}

}  // namespace tda
