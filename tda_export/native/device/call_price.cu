// tda::CallPrice on CUDA: the price of a call, 0 where it has no past.

struct CallPriceArguments {
  const long long* mask;  // [buffer]: ones for past and call, then zeros
  const float* given;     // [1]
  float* price;           // [1]
  int tokens, buffer;     // S, T
};

// One warp counts the tokens of past and call.
extern "C" __global__ void __launch_bounds__(kWarp) CallPrice(CallPriceArguments a) {
  WaitForEarlierKernels();
  LetNextKernelStart();
  int count = 0;
  for (int i = threadIdx.x; i < a.buffer; i += kWarp) count += static_cast<int>(a.mask[i]);
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset >>= 1) count += __shfl_xor_sync(0xffffffffu, count, offset);
  if (threadIdx.x == 0) *a.price = count > a.tokens ? *a.given : 0.0f;
}
