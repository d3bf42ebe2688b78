// tda::CallStart on CUDA: what a call needs before its layers. It counts the tokens of past and call, and its price is 0
// where there is no past. tda::CallPrice, of earlier artifacts, gives the price alone.

constexpr int kCallThreads = 1024, kCallWarps = kCallThreads / kWarp;

struct CallStartArguments {
  const long long* mask;  // [buffer]: ones for past and call, then zeros
  const float* given;     // [1]
  float* price;           // [1]
  long long* total;       // [1], or null
  int* last_index;        // [1]: total - 1, or null
  int tokens, buffer;     // S, T
};

extern "C" __global__ void __launch_bounds__(kCallThreads) CallStart(CallStartArguments a) {
  __shared__ int counts[kCallWarps];
  WaitForEarlierKernels();
  LetNextKernelStart();
  int count = 0;
#pragma unroll 8
  for (int i = threadIdx.x; i < a.buffer; i += kCallThreads) count += static_cast<int>(a.mask[i]);
  count = WarpSum(count);
  if (threadIdx.x % kWarp == 0) counts[threadIdx.x / kWarp] = count;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  const int total = WarpSum(threadIdx.x < kCallWarps ? counts[threadIdx.x] : 0);
  if (threadIdx.x != 0) return;
  *a.price = total > a.tokens ? *a.given : 0.0f;
  if (a.total) *a.total = total;
  if (a.last_index) *a.last_index = total - 1;
}
