// tda::GreedyToken on CUDA: the index of the largest logit of each token, -1 where one of them is not finite.

struct GreedyArguments {
  const float* logits;  // [tokens, vocabulary]
  float* best;          // [tokens, blocks]: the largest logit of each block's share, NaN where one is not finite
  int* place;           // [tokens, blocks]: its index
  long long* tokens;    // [tokens]
  int vocabulary, blocks;
};

// The larger of two logits, the first of equal ones. A non-finite logit wins over all others.
static __device__ __forceinline__ void TakeBetter(float& value, int& place, float other, int other_place) {
  const bool better = other > value || (other == value && other_place < place);
  if (!isnan(value) && (better || isnan(other))) {
    value = other;
    place = other_place;
  }
}

static __device__ __forceinline__ void WarpBest(float& value, int& place) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset >>= 1) {
    const float other = __shfl_xor_sync(0xffffffffu, value, offset);
    TakeBetter(value, place, other, __shfl_xor_sync(0xffffffffu, place, offset));
  }
}

extern "C" __global__ void __launch_bounds__(kThreads) BestOfShares(GreedyArguments a) {
  __shared__ float values[kWarps];
  __shared__ int places[kWarps];
  WaitForEarlierKernels();
  LetNextKernelStart();
  const float* logits = a.logits + static_cast<size_t>(blockIdx.y) * a.vocabulary;
  float value = __int_as_float(0xff800000);  // -infinity
  int place = a.vocabulary;
#pragma unroll 4
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < a.vocabulary; i += a.blocks * kThreads) {
    const float logit = logits[i];
    TakeBetter(value, place, isfinite(logit) ? logit : __int_as_float(0x7fffffff), i);
  }
  WarpBest(value, place);
  if (threadIdx.x % kWarp == 0) {
    values[threadIdx.x / kWarp] = value;
    places[threadIdx.x / kWarp] = place;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; ++w) TakeBetter(value, place, values[w], places[w]);
  a.best[blockIdx.y * a.blocks + blockIdx.x] = value;
  a.place[blockIdx.y * a.blocks + blockIdx.x] = place;
}

// One warp a token; there are at most as many blocks as lanes.
extern "C" __global__ void __launch_bounds__(kWarp) BestOfAll(GreedyArguments a) {
  WaitForEarlierKernels();
  LetNextKernelStart();
  float value = __int_as_float(0xff800000);
  int place = a.vocabulary;
  if (threadIdx.x < a.blocks) {
    value = a.best[blockIdx.x * a.blocks + threadIdx.x];
    place = a.place[blockIdx.x * a.blocks + threadIdx.x];
  }
  WarpBest(value, place);
  if (threadIdx.x == 0) a.tokens[blockIdx.x] = isnan(value) ? -1 : place;
}
