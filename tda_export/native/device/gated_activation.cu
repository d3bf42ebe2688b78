// tda::GatedActivation on CUDA: h = act(gate) * up. Compile-time constant: TDA_ACTIVATION (device/activation.cuh).

struct GatedArguments {
  const Element* gate;  // row t begins at t * stride
  const Element* up;
  Element* h;  // [tokens, neurons]
  int tokens, neurons, stride;
};

template <int kWidth>
static __device__ __forceinline__ void GatedActivation(const GatedArguments& a) {
  WaitForEarlierKernels();
  LetNextKernelStart();
  const int first = (blockIdx.x * kThreads + threadIdx.x) * kWidth;
  if (first >= a.neurons) return;
  for (int token = blockIdx.y; token < a.tokens; token += gridDim.y) {
    const size_t row = static_cast<size_t>(token) * a.stride;
    float gate[kWidth], up[kWidth];
    Load<kWidth>(a.gate + row + first).ToFloats(gate);
    Load<kWidth>(a.up + row + first).ToFloats(up);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) gate[i] = Gated(gate[i], up[i]);
    Store<kWidth>(a.h + static_cast<size_t>(token) * a.neurons + first, gate);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads) Gated_8(GatedArguments arguments) {
  GatedActivation<8>(arguments);
}
extern "C" __global__ void __launch_bounds__(kThreads) Gated_1(GatedArguments arguments) {
  GatedActivation<1>(arguments);
}
