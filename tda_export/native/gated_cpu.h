// The product of tda::GatedActivation on the CPU, for the operator and for products that make their own input.
#pragma once

#include <cstdint>

#include "activation.h"

namespace tda {

// Compute act(gate) * up [neurons].
void MultiplyGated(Activation activation, const float* gate, const float* up, int64_t neurons, float* h);

}  // namespace tda
