#pragma once

#include "op.h"

namespace tda {

// tda::RmsNorm, and NormRowLinear, RmsRowLinear, GatedRowLinear, GatedRowLinearAdd and RowLinearAdd, each with forms for
// codes of 4 and 8 bits, for kHalf and kBfloat16. row_linear_cpu.h has those of float32 graphs on the CPU.
std::vector<OpDefinition> FusedRowLinearOnCuda();

}  // namespace tda
