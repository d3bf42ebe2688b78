// How keys and values lie in a cache. A row is what one token has for one head. Attention reaches rows through KvRows,
// which is FloatRows or, with TDA_KV_CODES, CodeRows:
//
//   Stored     an element in memory
//   kElements  of one load of a thread: 16 bytes
//   Pack       what a load gives; FourToFloats(i, floats) converts elements i to i + 3
//   kScaled    a row has a scale, which its elements are multiplied with; keys, and so queries too, are multiplied by a
//              Hadamard matrix, which spreads a key's few large elements over all elements
//   Write      write a row

// One head of at most kLaneElements * 32 elements, in a warp: element i of a lane is element lane + 32 i of the head.
// Elements behind the head's size are zero.
template <int kLaneElements>
struct WarpHead {
  float own[kLaneElements] = {};

  static __device__ __forceinline__ int Index(int i) { return threadIdx.x % kWarp + kWarp * i; }

  // Set every element to element(index).
  template <class Elements>
  __device__ __forceinline__ void Set(int size, const Elements& element) {
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) own[i] = Index(i) < size ? element(Index(i)) : 0.0f;
  }

  // Multiply by the Hadamard matrix: Sylvester's, of the largest power of two that divides the size, in blocks.
  __device__ __forceinline__ void Spread(int size) {
    const int block = size & -size;
#pragma unroll
    for (int half = 1; half < kWarp; half *= 2) {
      if (half >= block) break;
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i) {
        const float other = __shfl_xor_sync(0xffffffffu, own[i], half);
        own[i] = threadIdx.x & half ? other - own[i] : own[i] + other;
      }
    }
#pragma unroll
    for (int half = 1; half < kLaneElements; half *= 2) {
      if (half * kWarp >= block) break;
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i) {
        if (i & half) continue;
        const float first = own[i], second = own[i + half];
        own[i] = first + second;
        own[i + half] = first - second;
      }
    }
    const float unit = 1.0f / sqrtf(static_cast<float>(block));
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) own[i] *= unit;
  }

  // Return the largest magnitude; what is not a number does not count.
  __device__ __forceinline__ float Largest() const {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) largest = fmaxf(largest, fabsf(own[i]));
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset >>= 1) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
    }
    return largest;
  }

  // Divide by a power of two, which is returned, so that the largest magnitude is from 1 to 2.
  __device__ __forceinline__ float TakeUnit() {
    const float power = __uint_as_float(__float_as_uint(Largest()) & 0x7f800000u);
    const float unit = power > 0.0f ? power : 1.0f;
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) own[i] /= unit;
    return unit;
  }
};

// Eight elements in 16 bytes.
struct KvElementPack {
  uint4 bits;

  __device__ __forceinline__ void FourToFloats(int i, float* values) const {
    const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) values[j] = ToFloat(static_cast<Element>(words[(i + j) / 2] >> (j % 2 * 16)));
  }
};

struct FloatRows {
  using Stored = Element;
  using Pack = KvElementPack;
  static constexpr int kElements = 8;
  static constexpr bool kScaled = false;

  template <int kLaneElements>
  static __device__ __forceinline__ void Write(const WarpHead<kLaneElements>& head, int size, Stored* row, float*) {
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      if (head.Index(i) < size) row[head.Index(i)] = FromFloat(head.own[i]);
    }
  }
};

// Sixteen codes in 16 bytes.
struct KvCodePack {
  uint4 bits;

  __device__ __forceinline__ void FourToFloats(int i, float* values) const {
    const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
    const unsigned biased = words[i / 4] ^ 0x80808080u;  // 128 + code
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      // With the exponent of 2^23, the lowest byte of a float32 counts ones.
      values[j] = __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7440u + j)) - 8388736.0f;
    }
  }
};

// Codes from -127 to 127, and a scale.
struct CodeRows {
  using Stored = signed char;
  using Pack = KvCodePack;
  static constexpr int kElements = 16;
  static constexpr bool kScaled = true;

  // Round to nearest, ties to even. The scale is NaN where the head is not finite.
  template <int kLaneElements>
  static __device__ __forceinline__ void Write(const WarpHead<kLaneElements>& head, int size, Stored* row,
                                               float* scale) {
    constexpr float kLargest = 127.0f;
    float spoiled = 0.0f;
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) spoiled += head.own[i] - head.own[i];  // NaN if not finite, otherwise 0
    const float own_scale = head.Largest() / kLargest + WarpSum(spoiled);
    const float divisor = own_scale > 0.0f ? own_scale : 1.0f;
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      const float code = fminf(fmaxf(rintf(head.own[i] / divisor), -kLargest), kLargest);
      if (head.Index(i) < size) row[head.Index(i)] = static_cast<Stored>(static_cast<int>(code));
    }
    if (threadIdx.x % kWarp == 0) *scale = own_scale;
  }
};

#if TDA_KV_CODES
using KvRows = CodeRows;
#else
using KvRows = FloatRows;
#endif
