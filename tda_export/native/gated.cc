#include "gated.h"

namespace tda {

GatedCall::GatedCall(const KernelContext& context, size_t place)
    : gate(context.Input(place)), up(context.Input(place + 1)) {
  if (gate.rank == 0) Fail("gate: expected shape [.., neurons], got ", gate.Shape());
  const int64_t width = gate.sizes[gate.rank - 1];
  h = gate;
  if (up.present) {
    if (up.Shape() != gate.Shape()) Fail("up: expected shape ", gate.Shape(), ", got ", up.Shape());
  } else {
    if (width % 2) Fail("gate: expected shape [.., 2 * neurons], got ", gate.Shape());
    h.sizes[h.rank - 1] = width / 2;
  }
  neurons = h.sizes[h.rank - 1];
  stride = width;
  tokens = neurons == 0 ? 0 : h.Count() / neurons;
}

}  // namespace tda
