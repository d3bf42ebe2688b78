#pragma once

#include "op.h"

namespace tda {

// For weights of kHalf or kBfloat16.
OpDefinition RowLinearOnCuda(ElementType type);

}  // namespace tda
