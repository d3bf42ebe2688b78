// AttendByMatrices, and which way is taken (kv_sums.cuh).

// Whether tensor cores take what the cache stores: codes, or float16.
#define TDA_KV_MATRICES (__CUDA_ARCH__ >= 800 && (TDA_KV_CODES || !TDA_BF16))

#if TDA_KV_MATRICES

// Split a number into two float16 whose sum is as exact as 22 bits, in the normal range of float16.
static __device__ __forceinline__ HalfPair SplitHalves(float value) {
  const float first = HalfToFloat(static_cast<unsigned short>(ToHalves(value, 0.0f)));
  return ToHalves(first, value - first);
}

// How words of a row become float16. Each has
//
//   kWord     elements of a word
//   OfKey     from the words at `words`, elements 0 and 1, and elements 2 and 3
//   OfValues  from a word of each of two rows, each element of the first row with that of the second
#if TDA_KV_CODES
struct WordPairs {
  static constexpr int kWord = 4;

  // Convert bytes 0 and 1 (`upper`: 2 and 3) of 128 + code to codes. With the exponent of 1024, the low bits of a float16
  // count ones.
  static __device__ __forceinline__ HalfPair CodesToHalves(unsigned biased, bool upper) {
    HalfPair pair = __byte_perm(biased, 0x64646464u, upper ? 0x4342u : 0x4140u);
    asm("add.rn.f16x2 %0, %0, %1;" : "+r"(pair) : "r"(0xe480e480u));  // -1152
    return pair;
  }

  static __device__ __forceinline__ void OfKey(const unsigned* words, HalfPair* pairs) {
    const unsigned biased = words[0] ^ 0x80808080u;
    pairs[0] = CodesToHalves(biased, false);
    pairs[1] = CodesToHalves(biased, true);
  }

  static __device__ __forceinline__ void OfValues(unsigned first_word, unsigned second_word, HalfPair* pairs) {
    const unsigned first = first_word ^ 0x80808080u, second = second_word ^ 0x80808080u;
    const unsigned low = __byte_perm(first, second, 0x5140u), high = __byte_perm(first, second, 0x7362u);
    pairs[0] = CodesToHalves(low, false);
    pairs[1] = CodesToHalves(low, true);
    pairs[2] = CodesToHalves(high, false);
    pairs[3] = CodesToHalves(high, true);
  }
};
#else
struct WordPairs {
  static constexpr int kWord = 2;

  static __device__ __forceinline__ void OfKey(const unsigned* words, HalfPair* pairs) {
    pairs[0] = words[0];
    pairs[1] = words[1];
  }

  static __device__ __forceinline__ void OfValues(unsigned first_word, unsigned second_word, HalfPair* pairs) {
    pairs[0] = __byte_perm(first_word, second_word, 0x5410u);
    pairs[1] = __byte_perm(first_word, second_word, 0x7632u);
  }
};
#endif

// Transpose a matrix [8, 8] of float16, of which a lane holds columns 2 c and 2 c + 1 of row g.
static __device__ __forceinline__ HalfPair Transposed(HalfPair pair) {
  HalfPair result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// A warp reads 16 rows at a time. Their products with queries are one matrix product, rows times elements by elements
// times heads, and the values' weighted sums another, elements times rows by rows times heads. Queries and weights are
// split into two float16 each, in neighbouring columns, so results are nearly as exact as in float32. Where a query, a key
// or a value is infinite, results that it reaches may be NaN. The order of elements within
// products is free; it is such that a lane reads 16 bytes of a row.
template <int kSize, int kHeads, int kThreads>
struct AttendByMatrices {
  using Shared = InShared<kSize>;
  static_assert(kHeads <= 4, "a head has two of eight columns");
  static constexpr int kRows = 16, kPartRows = kRows;  // of a warp
  static constexpr int kSlots = kThreads / kWarp, kChunk = kSlots * kRows;
  static constexpr int kStride = kSize + 8;  // so that lanes of different heads write to different banks
  static constexpr bool kUnits = true;
  static constexpr int kWord = WordPairs::kWord;
  // Four lanes read a key, 16 bytes each; four elements are a part of a product.
  static constexpr int kKeyElements = 4 * kWord, kKeyLoads = kSize / 4 / kKeyElements, kKeyParts = kKeyElements / 4;
  // Eight lanes read a value.
  static constexpr int kValueElements = kSize / 8 < 4 * kWord ? kSize / 8 : 4 * kWord;
  static constexpr int kValueLoads = kSize / 8 / kValueElements;
  static constexpr int kValueWords = kValueElements / kWord;
  static constexpr float kLeastScale = -40.0f;  // as a base-2 logarithm

  static __device__ __forceinline__ void Run(const KvPart& rows, const float (*queries)[kSize], const float* units,
                                             float (*largest)[kHeads], float (*weights)[kHeads],
                                             float (*sums)[kHeads][kStride]) {
    const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, c = threadIdx.x % 4;
    HalfPair query[kKeyLoads][kKeyParts][2];  // of head g / 2; the first parts in even columns, the second in odd ones
#pragma unroll
    for (int i = 0; i < kKeyLoads; ++i)
#pragma unroll
      for (int p = 0; p < kKeyParts; ++p) {
        float four[4] = {};
        if (g / 2 < kHeads) Shared::Load(queries[g / 2], 4 * kKeyElements * i + kKeyElements * c + 4 * p, four);
        HalfPair split[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) split[j] = SplitHalves(four[j]);
        query[i][p][0] = __byte_perm(split[0], split[1], g % 2 ? 0x7632u : 0x5410u);
        query[i][p][1] = __byte_perm(split[2], split[3], g % 2 ? 0x7632u : 0x5410u);
      }
    const float unit = c < kHeads ? units[c] : 1.0f;
    // Weights are relative to the largest weight times its value's scale, so that float16 holds their products.
    float top = Nothing(), weight = 0.0f;
    float sum[kValueLoads][kValueElements / 2][4] = {};  // of two elements of row g, and head c in two parts

#pragma unroll 1
    for (int base = rows.from + warp * kRows; base < rows.to; base += kChunk) {
      unsigned keys[2][kKeyLoads][4], values[4][kValueLoads][kValueWords];
      float key_scales[2], value_scales[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = base + g + 8 * r;
#pragma unroll
        for (int i = 0; i < kKeyLoads; ++i) {
          LoadWords<4>(keys[r][i], rows.keys, rows, row, 4 * kKeyElements * i + kKeyElements * c);
        }
        key_scales[r] = value_scales[r] = 1.0f;
        if constexpr (KvRows::kScaled) {
          key_scales[r] = row < rows.to ? rows.key_scales[row] : 0.0f;
          value_scales[r] = row < rows.to ? rows.value_scales[row] : 0.0f;
        }
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int row = base + 2 * c + r % 2 + r / 2 * 8;
#pragma unroll
        for (int i = 0; i < kValueLoads; ++i) {
          LoadWords<kValueWords>(values[r][i], rows.values, rows, row, 8 * kValueElements * i + kValueElements * g);
        }
      }

      float products[4] = {};
#pragma unroll
      for (int i = 0; i < kKeyLoads; ++i)
#pragma unroll
        for (int p = 0; p < kKeyParts; ++p) {
          HalfPair first[2], second[2];
          WordPairs::OfKey(keys[0][i] + 4 * p / kWord, first);
          WordPairs::OfKey(keys[1][i] + 4 * p / kWord, second);
          const HalfPair elements[4] = {first[0], second[0], first[1], second[1]};
          AddProduct(products, elements, query[i][p]);
        }
      float scores[2], next = top;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float score = (products[2 * r] + products[2 * r + 1]) * unit;
        if constexpr (KvRows::kScaled) score *= key_scales[r];
        scores[r] = base + g + 8 * r < rows.to ? Score(rows, score) : Nothing();
        float scale = 0.0f;
        if constexpr (KvRows::kScaled) {
          scale = value_scales[r] > 0.0f ? fmaxf(__log2f(value_scales[r]), kLeastScale) : kLeastScale;
        }
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
        weighted[r] = Transposed(SplitHalves(KvRows::kScaled ? own * value_scales[r] : own));
      }
#pragma unroll
      for (int i = 0; i < kValueLoads; ++i)
#pragma unroll
        for (int w = 0; w < kValueWords; ++w) {
          HalfPair pairs[2][kWord];
#pragma unroll
          for (int r = 0; r < 2; ++r) WordPairs::OfValues(values[2 * r][i][w], values[2 * r + 1][i][w], pairs[r]);
#pragma unroll
          for (int e = 0; e < kWord; e += 2) {
            float* own = sum[i][(w * kWord + e) / 2];
#pragma unroll
            for (int j = 0; j < 4; ++j) own[j] *= factor;
            const HalfPair elements[4] = {pairs[0][e], pairs[0][e + 1], pairs[1][e], pairs[1][e + 1]};
            AddProduct(own, elements, weighted);
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
      for (int e = 0; e < kValueElements; e += 4) {
        float four[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* own = sum[i][(e + j) / 2] + j % 2 * 2;
          four[j] = own[0] + own[1];
        }
        const int d = 8 * kValueElements * i + kValueElements * g + e;
        *reinterpret_cast<float4*>(&sums[warp][c][Shared::Place(d)]) = make_float4(four[0], four[1], four[2], four[3]);
      }
  }

  // Load words of a row from element d on; zeros where there are none.
  template <int kWords>
  static __device__ __forceinline__ void LoadWords(unsigned* words, const KvRows::Stored* all, const KvPart& rows,
                                                   int row, int d) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = 0;
    if (row >= rows.to || d >= rows.size) return;
    const KvRows::Stored* address = all + static_cast<size_t>(row) * rows.size + d;
    if constexpr (kWords == 4) {
      const uint4 bits = LoadBits(address);
      words[0] = bits.x;
      words[1] = bits.y;
      words[2] = bits.z;
      words[3] = bits.w;
    } else {
      static_assert(kWords == 2, "8 or 16 bytes");
      const uint2 bits = *reinterpret_cast<const uint2*>(address);
      words[0] = bits.x;
      words[1] = bits.y;
    }
  }
};

#endif

#if TDA_KV_MATRICES
template <int kSize, int kHeads, int kThreads>
using AttendLoop = AttendByMatrices<kSize, kHeads, kThreads>;
#else
template <int kSize, int kHeads, int kThreads>
using AttendLoop = AttendByLanes<kSize, kHeads, kThreads>;
#endif
