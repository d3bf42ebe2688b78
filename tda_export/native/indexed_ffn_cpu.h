#pragma once

#include "op.h"

namespace tda {

OpDefinition IndexedFfnOnCpu();

}  // namespace tda
