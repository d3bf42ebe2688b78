#pragma once

#include "op.h"

namespace tda {

// RowLinear, RowLinear4 and RowLinear8, for activations of kHalf and kBfloat16.
std::vector<OpDefinition> RowLinearOnCuda();

}  // namespace tda
