// tda::IndexedFFN, the part that both providers share: its inputs and their checks.
//
//   y = sum over k of h[k] * w_down[i[k]] + b_down,   h[k] = act(w_gate[i] . x + b_gate[i]) * (w_up[i] . x + b_up[i])
//
// for the neurons i = mask_indices[k]; without w_gate h[k] = act(w_up[i] . x + b_up[i]). -1 pads. With neuron_scale, a
// neuron whose |act(gate)| * neuron_scale[i] (without w_gate: |h| * neuron_scale[i]) is under token_thresholds[layer]
// contributes nothing to that token, and its rows of w_up and w_down are not read.
#pragma once

#include "activation.h"
#include "op.h"

namespace tda {

// Inputs by position.
enum IndexedFfnInput : size_t {
  kX,
  kMaskIndices,
  kGate,
  kUp,
  kDown,
  kGateBias,
  kUpBias,
  kDownBias,
  kNeuronScale,
  kTokenThresholds,
};

// Types of inputs and outputs for weights of `type`.
std::vector<IoType> IndexedFfnInputs(ElementType type);

struct IndexedFfnArguments {
  // Read and check the inputs of a call. The layer is checked against token_thresholds.
  IndexedFfnArguments(const KernelContext& context, int64_t layer);

  int64_t tokens;   // S
  int64_t hidden;   // M
  int64_t neurons;  // F
  int64_t indices;  // K
  Tensor x, mask_indices, gate, up, down, gate_bias, up_bias, down_bias, neuron_scale, token_thresholds;
};

}  // namespace tda
