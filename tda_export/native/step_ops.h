// Small operators between the products of a decode step.
#pragma once

#include <vector>

#include "op.h"

namespace tda {

std::vector<OpDefinition> StepOps();

}  // namespace tda
