#pragma once

#include "op.h"

namespace tda {

// Linear4 and Linear8, AddNorm and AddBiasNorm.
std::vector<OpDefinition> LinearOnCpu();

}  // namespace tda
