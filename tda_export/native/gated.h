// The inputs of tda::GatedActivation, which products that make their own have as well.
#pragma once

#include "ort.h"

namespace tda {

// Describe a call: gate and up [.., F], or one input [.., 2 F] that holds them side by side.
struct GatedCall {
  // `place` is that of the input gate.
  explicit GatedCall(const KernelContext& context, size_t place = 0);

  // The start of a row's second half, in elements of T, where up has no separate input.
  template <class T>
  const T* Up() const {
    return up.present ? up.As<const T>() : gate.As<const T>() + neurons;
  }

  Tensor gate, up;
  Tensor h;  // the shape of the result, [.., F]
  int64_t tokens, neurons, stride;
};

}  // namespace tda
