// Products of small matrices of float16, which GPUs from Ampere on compute by tensor cores.

// Two float16 in a register.
using HalfPair = unsigned;

static __device__ __forceinline__ HalfPair ProductOf(HalfPair a, HalfPair b) {
  HalfPair product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

#if __CUDA_ARCH__ >= 800

static __device__ __forceinline__ HalfPair ToHalves(float low, float high) {
  HalfPair pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Add the product of matrices [16, 16] and [16, 8] of float16 to one of float32. With g = lane / 4 and c = lane % 4 a lane
// holds: of the first, pairs of columns 2 c and 2 c + 8 in rows g and g + 8, in the order (row g, row g + 8) by columns; of
// the second, rows 2 c and 2 c + 8, and those after them, of column g; of the sum, columns 2 c and 2 c + 1 of rows g and
// g + 8.
static __device__ __forceinline__ void AddProduct(float* sum, const HalfPair* first, const HalfPair* second) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(first[0]), "r"(first[1]), "r"(first[2]), "r"(first[3]), "r"(second[0]), "r"(second[1]));
}

#endif
