#pragma once

#include "op.h"

namespace tda {

// tda::RmsNorm, and NormRowLinear, RmsRowLinear, GatedRowLinear, GatedRowLinearAdd and RowLinearAdd, each with forms for codes
// of 4 and 8 bits, for kHalf and kBfloat16. There are none for the CPU, where float32 graphs have separate operators.
std::vector<OpDefinition> FusedRowLinearOnCuda();

}  // namespace tda
