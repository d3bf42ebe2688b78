#pragma once

#include "op.h"

namespace tda {

OpDefinition RowLinearOnCpu();

}  // namespace tda
