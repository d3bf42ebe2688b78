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

// Squares that the kernel that stores a sum has added for the norm of it: a part for each kWarp columns.
static __device__ __forceinline__ unsigned SquareParts(unsigned columns) { return (columns + kWarp - 1) / kWarp; }

// They, read by a warp: a lane has parts kWarp apart.
struct GivenSquares {
  static constexpr unsigned kHeld = 8;  // of 8192 columns; of more, a lane reads the rest later

  __device__ __forceinline__ void Read(const float* squares, unsigned columns) {
    const unsigned lane = threadIdx.x % kWarp, parts = SquareParts(columns);
#pragma unroll
    for (unsigned i = 0; i < kHeld; ++i) held[i] = lane + i * kWarp < parts ? squares[lane + i * kWarp] : 0.0f;
  }

  // Return what every sum is multiplied with. All lanes call it.
  __device__ __forceinline__ float Scale(const float* squares, unsigned columns, float epsilon) const {
    const unsigned lane = threadIdx.x % kWarp, parts = SquareParts(columns);
    float sum = 0.0f;
#pragma unroll
    for (unsigned i = 0; i < kHeld; ++i) sum += held[i];
    for (unsigned part = lane + kHeld * kWarp; part < parts; part += kWarp) sum += squares[part];
    return rsqrtf(WarpSum(sum) / columns + epsilon);
  }

  float held[kHeld];
};
