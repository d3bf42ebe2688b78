#pragma once

#include "op.h"

namespace tda {

// Linear4 and Linear8.
std::vector<OpDefinition> LinearOnCpu();

}  // namespace tda
