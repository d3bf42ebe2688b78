#pragma once

#include <vector>

#include "op.h"

namespace tda {

std::vector<OpDefinition> AttentionOnCpu();

}  // namespace tda
