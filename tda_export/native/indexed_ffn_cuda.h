#pragma once

#include "op.h"

namespace tda {

// `type` is kHalf or kBfloat16.
OpDefinition IndexedFfnOnCuda(ElementType type);

}  // namespace tda
