// The RMS norm (arXiv 1910.07467) of a sum, as tda::AddNorm computes it, also for products that make their own norm. Both
// give the same bits: the compiler has no choice between a product that is rounded and one that is not, and squares are
// added in the order of one block of kNormThreads threads, whichever block adds them.

constexpr int kNormThreads = 512;
constexpr int kNormWarps = kNormThreads / kWarp;

// Round x + residual + bias, as the model's dtype has it, and return the squares' sum.
template <int kWidth>
static __device__ __forceinline__ float RoundSums(const Pack<kWidth>& x, const Pack<kWidth>& residual,
                                                  const float* bias, float* sums) {
  float r[kWidth], square = 0.0f;
  x.ToFloats(sums);
  residual.ToFloats(r);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    sums[i] = ToFloat(FromFloat(sums[i] + r[i] + bias[i]));
    square = fmaf(sums[i], sums[i], square);
  }
  return square;
}

// Return what every sum is multiplied with, from the squares' sums of the warps.
static __device__ __forceinline__ float NormScale(const float (&squares)[kNormWarps], int hidden, float epsilon) {
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < kNormWarps; ++w) total += squares[w];
  return rsqrtf(total / hidden + epsilon);
}

static __device__ __forceinline__ float Normed(float weight, float sum, float scale) { return weight * (sum * scale); }
