// AttendByMatrices, and which way is taken (kv_sums.cuh).

#if TDA_KV_CODES && __CUDA_ARCH__ >= 800

// Split a number into two float16 whose sum is as exact as 22 bits.
static __device__ __forceinline__ HalfPair SplitHalves(float value) {
  const float first = HalfToFloat(static_cast<unsigned short>(ToHalves(value, 0.0f)));
  return ToHalves(first, value - first);
}

// Convert bytes 0 and 1 (`upper`: 2 and 3) of 128 + code to codes. With the exponent of 1024, the low bits of a float16
// count ones.
static __device__ __forceinline__ HalfPair CodesToHalves(unsigned biased, bool upper) {
  HalfPair pair = __byte_perm(biased, 0x64646464u, upper ? 0x4342u : 0x4140u);
  asm("add.rn.f16x2 %0, %0, %1;" : "+r"(pair) : "r"(0xe480e480u));  // -1152
  return pair;
}

// Transpose a matrix [8, 8] of float16, of which a lane holds columns 2 c and 2 c + 1 of row g.
static __device__ __forceinline__ HalfPair Transposed(HalfPair pair) {
  HalfPair result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// A warp reads 16 rows at a time. Their products with queries are one matrix product, rows times elements by elements
// times heads, and the values' weighted sums another, elements times rows by rows times heads. Queries and weights are
// split into two float16 each, in neighbouring columns, so nothing is lost to float16. The order of elements within
// products is free; it is such that a lane reads 16 bytes of a row.
template <int kSize, int kHeads, int kThreads>
struct AttendByMatrices {
  using Shared = InShared<kSize>;
  static_assert(kHeads <= 4, "a head has two of eight columns");
  static constexpr int kRows = 16, kPartRows = kRows;  // of a warp
  static constexpr int kSlots = kThreads / kWarp, kChunk = kSlots * kRows;
  static constexpr int kStride = kSize + 8;  // so that lanes of different heads write to different banks
  static constexpr bool kUnits = true;
  static constexpr int kKeyLoads = kSize / 64;                       // four lanes read a key, 16 bytes each
  static constexpr int kValueBytes = kSize < 128 ? kSize / 8 : 16;   // eight lanes read a value
  static constexpr int kValueLoads = kSize / 8 / kValueBytes;
  static constexpr int kValueWords = kValueBytes / 4;
  static constexpr float kLeastScale = -40.0f;  // as a base-2 logarithm

  static __device__ __forceinline__ void Run(const KvPart& rows, const float (*queries)[kSize], const float* units,
                                             float (*largest)[kHeads], float (*weights)[kHeads],
                                             float (*sums)[kHeads][kStride]) {
    const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, c = threadIdx.x % 4;
    HalfPair query[kKeyLoads][4][2];  // of head g / 2; the first parts in even columns, the second ones in odd columns
#pragma unroll
    for (int i = 0; i < kKeyLoads; ++i)
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        float four[4] = {};
        if (g / 2 < kHeads) Shared::Load(queries[g / 2], 64 * i + 16 * c + 4 * w, four);
        HalfPair split[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) split[j] = SplitHalves(four[j]);
        query[i][w][0] = __byte_perm(split[0], split[1], g % 2 ? 0x7632u : 0x5410u);
        query[i][w][1] = __byte_perm(split[2], split[3], g % 2 ? 0x7632u : 0x5410u);
      }
    const float unit = c < kHeads ? units[c] : 1.0f;
    // Weights are relative to the largest weight times its value's scale, so that float16 holds their products.
    float top = Nothing(), weight = 0.0f;
    float sum[kValueLoads][kValueWords][2][4] = {};  // of elements g, and head c in two parts

#pragma unroll 1
    for (int base = rows.from + warp * kRows; base < rows.to; base += kChunk) {
      uint4 keys[2][kKeyLoads];
      unsigned values[4][kValueLoads][kValueWords];
      float key_scales[2], value_scales[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = base + g + 8 * r;
#pragma unroll
        for (int i = 0; i < kKeyLoads; ++i) {
          const int d = 64 * i + 16 * c;
          keys[r][i] = make_uint4(0, 0, 0, 0);
          if (row < rows.to && d < rows.size) {
            keys[r][i] = LoadBits(rows.keys + static_cast<size_t>(row) * rows.size + d);
          }
        }
        key_scales[r] = row < rows.to ? rows.key_scales[row] : 0.0f;
        value_scales[r] = row < rows.to ? rows.value_scales[row] : 0.0f;
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int row = base + 2 * c + r % 2 + r / 2 * 8;
#pragma unroll
        for (int i = 0; i < kValueLoads; ++i) {
          LoadWords(values[r][i], rows, row, 8 * kValueBytes * i + kValueBytes * g);
        }
      }

      float products[4] = {};
#pragma unroll
      for (int i = 0; i < kKeyLoads; ++i) {
        const unsigned words[2][4] = {{keys[0][i].x, keys[0][i].y, keys[0][i].z, keys[0][i].w},
                                      {keys[1][i].x, keys[1][i].y, keys[1][i].z, keys[1][i].w}};
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const unsigned first = words[0][w] ^ 0x80808080u, second = words[1][w] ^ 0x80808080u;
          const HalfPair codes[4] = {CodesToHalves(first, false), CodesToHalves(second, false),
                                     CodesToHalves(first, true), CodesToHalves(second, true)};
          AddProduct(products, codes, query[i][w]);
        }
      }
      float scores[2], next = top;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float score = Score(rows, (products[2 * r] + products[2 * r + 1]) * unit * key_scales[r]);
        scores[r] = base + g + 8 * r < rows.to ? score : Nothing();
        const float scale = value_scales[r] > 0.0f ? fmaxf(__log2f(value_scales[r]), kLeastScale) : kLeastScale;
        next = fmaxf(next, scores[r] + scale);
      }
#pragma unroll
      for (int offset = 4; offset < kWarp; offset *= 2) next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, offset));
      const float factor = Factor(top, next);
      top = next;
      weight *= factor;
      HalfPair weighted[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float own = Factor(scores[r], top);
        weight += own;
        weighted[r] = Transposed(SplitHalves(own * value_scales[r]));
      }
#pragma unroll
      for (int i = 0; i < kValueLoads; ++i)
#pragma unroll
        for (int w = 0; w < kValueWords; ++w) {
          // Pairs of rows, of elements 4 w to 4 w + 3.
          HalfPair pairs[2][4];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const unsigned first = values[2 * r][i][w] ^ 0x80808080u, second = values[2 * r + 1][i][w] ^ 0x80808080u;
            const unsigned low = __byte_perm(first, second, 0x5140u), high = __byte_perm(first, second, 0x7362u);
            pairs[r][0] = CodesToHalves(low, false);
            pairs[r][1] = CodesToHalves(low, true);
            pairs[r][2] = CodesToHalves(high, false);
            pairs[r][3] = CodesToHalves(high, true);
          }
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float* own = sum[i][w][half];
#pragma unroll
            for (int j = 0; j < 4; ++j) own[j] *= factor;
            const HalfPair codes[4] = {pairs[0][2 * half], pairs[0][2 * half + 1], pairs[1][2 * half],
                                       pairs[1][2 * half + 1]};
            AddProduct(own, codes, weighted);
          }
        }
    }

#pragma unroll
    for (int offset = 4; offset < kWarp; offset *= 2) weight += __shfl_xor_sync(0xffffffffu, weight, offset);
    if (c >= kHeads) return;
    if (g == 0) {
      largest[warp][c] = top;
      weights[warp][c] = weight;
    }
#pragma unroll
    for (int i = 0; i < kValueLoads; ++i)
#pragma unroll
      for (int w = 0; w < kValueWords; ++w) {
        float four[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* own = sum[i][w][j / 2] + j % 2 * 2;
          four[j] = own[0] + own[1];
        }
        const int d = 8 * kValueBytes * i + kValueBytes * g + 4 * w;
        *reinterpret_cast<float4*>(&sums[warp][c][Shared::Place(d)]) = make_float4(four[0], four[1], four[2], four[3]);
      }
  }

  // Load kValueBytes of a value from element d on; zeros where there are none.
  static __device__ __forceinline__ void LoadWords(unsigned* words, const KvPart& rows, int row, int d) {
#pragma unroll
    for (int w = 0; w < kValueWords; ++w) words[w] = 0;
    if (row >= rows.to || d >= rows.size) return;
    const KvRows::Stored* address = rows.values + static_cast<size_t>(row) * rows.size + d;
    if constexpr (kValueWords == 4) {
      const uint4 bits = LoadBits(address);
      words[0] = bits.x;
      words[1] = bits.y;
      words[2] = bits.z;
      words[3] = bits.w;
    } else {
      static_assert(kValueWords == 2, "8 or 16 bytes");
      const uint2 bits = *reinterpret_cast<const uint2*>(address);
      words[0] = bits.x;
      words[1] = bits.y;
    }
  }
};

#endif

#if TDA_KV_CODES && __CUDA_ARCH__ >= 800
template <int kSize, int kHeads, int kThreads>
using AttendLoop = AttendByMatrices<kSize, kHeads, kThreads>;
#else
template <int kSize, int kHeads, int kThreads>
using AttendLoop = AttendByLanes<kSize, kHeads, kThreads>;
#endif
