#pragma once

#include "op.h"

namespace tda {

// RowLinear, RowLinear4 and RowLinear8.
std::vector<OpDefinition> RowLinearOnCpu();

}  // namespace tda
