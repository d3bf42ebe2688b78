#pragma once

#include "op.h"

namespace tda {

OpDefinition AttentionOnCpu();

}  // namespace tda
