#pragma once

#include "op.h"

namespace tda {

// tda::Linear, tda::Linear4, tda::Linear8, tda::AddNorm and tda::AddBiasNorm for kHalf and kBfloat16: what stands between
// the FFNs of decode. Of Linear and the norms there are no kernels for the CPU; float32 graphs have ONNX Runtime's own
// operators in their place.
std::vector<OpDefinition> LinearOnCuda();

}  // namespace tda
