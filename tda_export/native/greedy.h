#pragma once

#include "op.h"

namespace tda {

OpDefinition GreedyTokenOnCpu();
OpDefinition GreedyTokenOnCuda();

}  // namespace tda
