#pragma once

#include "op.h"

namespace tda {

// RowLinear, NormRowLinear and GatedRowLinear, each with forms for codes of 4 and 8 bits.
std::vector<OpDefinition> RowLinearOnCpu();

}  // namespace tda
