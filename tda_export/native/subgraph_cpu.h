#pragma once

#include "op.h"

namespace tda {

// Subgraph: nodes of this library that follow one another.
OpDefinition SubgraphOnCpu();

// Return this library's operator of a name on the CPU, which has one of each, or null. Defined in register.cc.
const OpDefinition* OperatorOnCpu(const std::string& name);

}  // namespace tda
