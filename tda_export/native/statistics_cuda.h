#pragma once

#include "op.h"

namespace tda {

// The operators of the prefill graph's statistics, for weights of kHalf or kBfloat16. On the CPU their function bodies
// run, so a session on the CPU must not register this library for a prefill graph.
std::vector<OpDefinition> StatisticsOnCuda();

}  // namespace tda
