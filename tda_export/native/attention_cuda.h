#pragma once

#include "op.h"

namespace tda {

// Attention for kHalf and kBfloat16.
std::vector<OpDefinition> AttentionOnCuda();

}  // namespace tda
