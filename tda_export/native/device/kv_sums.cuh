// Attention of the queries of some heads to rows of a cache, which they share, by one block. There are two ways:
//
//   AttendByLanes      any rows: some lanes read a row together and add products in float32
//   AttendByMatrices   codes and float16, on GPUs whose tensor cores have these shapes (Ampere and newer): converting and
//                      adding in float32 takes as long as reading the rows, or longer
//
// Each has
//
//   kSlots    partial results, which the block then combines
//   kPartRows a part of the cache has a multiple of so many rows
//   kStride   floats of a head's sum
//   kUnits    queries come divided by a unit of their head
//   Run       compute the partial results: each slot's largest score, sum of weights, and sum of weighted values

constexpr int kAttentionThreads = 128;  // of a block, unless it is a wide one
constexpr float kLog2E = 1.4426950408889634f;

// The score of a missing key: minus infinity.
static __device__ __forceinline__ float Nothing() { return __int_as_float(0xff800000); }

// The rows that a block reads, of one key-value head.
struct KvPart {
  const KvRows::Stored* keys;  // [.., size]
  const KvRows::Stored* values;
  const float* key_scales;  // [..], where rows have scales
  const float* value_scales;
  int size;
  int from, to;
  float softcap;  // 0: none
};

// Return the score of a product as a base-2 logarithm.
static __device__ __forceinline__ float Score(const KvPart& rows, float product) {
  if (rows.softcap > 0.0f) product = rows.softcap * tanhf(product / rows.softcap);
  return product * kLog2E;
}

// The partial result of some keys and values. Scores are base-2 logarithms; weights are relative to the largest.
template <int kElements>
struct Attended {
  float largest = Nothing();
  float weights = 0.0f;
  float sum[kElements] = {};
};

static __device__ __forceinline__ void LoadFour(const float* address, float* four) {
  const float4 loaded = *reinterpret_cast<const float4*>(address);
  four[0] = loaded.x;
  four[1] = loaded.y;
  four[2] = loaded.z;
  four[3] = loaded.w;
}

// Where the elements of a head lie in shared memory: by fours, so that neighbouring lanes, which have kElements each, read
// and write neighbouring fours.
template <int kSize>
struct InShared {
  static constexpr int kElements = KvRows::kElements, kLanes = kSize / kElements;

  static __device__ __forceinline__ int Place(int d) {
    const int lane = d / kElements, i = d % kElements;
    return (i / 4 * kLanes + lane) * 4 + i % 4;
  }
  static __device__ __forceinline__ int ElementAt(int place) {
    const int four = place / 4;
    return four % kLanes * kElements + four / kLanes * 4 + place % 4;
  }
  // Load elements d to d + 3, where d is a multiple of 4.
  static __device__ __forceinline__ void Load(const float* head, int d, float* four) {
    LoadFour(head + Place(d), four);
  }
};

// Load 16 bytes, which an earlier kernel of the stream or this block may have written.
static __device__ __forceinline__ uint4 LoadBits(const void* address) { return *static_cast<const uint4*>(address); }

// The factor that converts weights relative to `largest` to weights relative to `joint`.
static __device__ __forceinline__ float Factor(float largest, float joint) {
  return exp2f(largest - (joint == Nothing() ? 0.0f : joint));
}

// Join `count` partial results at some elements of a head: largest(p), weights(p), and load(p, sum).
template <int kElements, class Largest, class Weights, class Load>
static __device__ __forceinline__ Attended<kElements> Join(int count, const Largest& largest, const Weights& weights,
                                                           const Load& load) {
  Attended<kElements> joined;
#pragma unroll 8
  for (int p = 0; p < count; ++p) joined.largest = fmaxf(joined.largest, largest(p));
#pragma unroll 8
  for (int p = 0; p < count; ++p) {
    const float factor = Factor(largest(p), joined.largest);
    float sum[kElements];
    load(p, sum);
    joined.weights += factor * weights(p);
#pragma unroll
    for (int i = 0; i < kElements; ++i) joined.sum[i] += factor * sum[i];
  }
  return joined;
}

template <int kSize, int kHeads, int kThreads>
struct AttendByLanes {
  using Shared = InShared<kSize>;
  static constexpr int kElements = Shared::kElements, kLanes = Shared::kLanes;
  static constexpr int kKeys = kThreads / kLanes;                  // that are read together
  static constexpr int kRounds = (kHeads == 4 ? 4 : 8) * 8 / kElements;  // of them, all under way at once
  static constexpr int kSlots = kKeys, kPartRows = kKeys, kChunk = kKeys * kRounds, kStride = kSize;
  static constexpr bool kUnits = false;

  static __device__ __forceinline__ void Run(const KvPart& rows, const float (*queries)[kSize], const float*,
                                             float (*largest)[kHeads], float (*weights)[kHeads],
                                             float (*sums)[kHeads][kStride]) {
    const int lane = threadIdx.x % kLanes, slot = threadIdx.x / kLanes;
    const bool reads = lane * kElements < rows.size;
    constexpr bool kInRegisters = kHeads * kElements <= 32;  // the queries; otherwise they stay in shared memory
    float query[kHeads][kElements];
#pragma unroll
    for (int h = 0; h < kHeads; ++h)
#pragma unroll
      for (int i = 0; i < kElements; i += 4) {
        if constexpr (kInRegisters) Shared::Load(queries[h], lane * kElements + i, query[h] + i);
      }
    const KvRows::Stored* keys = rows.keys + lane * kElements;
    const KvRows::Stored* values = rows.values + lane * kElements;
    Attended<kElements> attended[kHeads];
#pragma unroll 1
    for (int base = rows.from; base < rows.to; base += kChunk) {
      KvRows::Pack key_packs[kRounds], value_packs[kRounds];
      float key_scales[kRounds], value_scales[kRounds];
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
        const int row = base + r * kKeys + slot;
        key_packs[r].bits = make_uint4(0, 0, 0, 0);
        if (reads && row < rows.to) key_packs[r].bits = LoadBits(keys + static_cast<size_t>(row) * rows.size);
        if constexpr (KvRows::kScaled) key_scales[r] = row < rows.to ? rows.key_scales[row] : 0.0f;
      }
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
        const int row = base + r * kKeys + slot;
        value_packs[r].bits = make_uint4(0, 0, 0, 0);
        if (reads && row < rows.to) value_packs[r].bits = LoadBits(values + static_cast<size_t>(row) * rows.size);
        if constexpr (KvRows::kScaled) value_scales[r] = row < rows.to ? rows.value_scales[row] : 0.0f;
      }
      float scores[kRounds][kHeads];
#pragma unroll
      for (int r = 0; r < kRounds; ++r)
#pragma unroll
        for (int h = 0; h < kHeads; ++h) scores[r][h] = 0.0f;
#pragma unroll
      for (int i = 0; i < kElements; i += 4) {
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          if constexpr (!kInRegisters) Shared::Load(queries[h], lane * kElements + i, query[h] + i);
        }
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
          float key[4];
          key_packs[r].FourToFloats(i, key);
#pragma unroll
          for (int h = 0; h < kHeads; ++h)
#pragma unroll
            for (int j = 0; j < 4; ++j) scores[r][h] = fmaf(query[h][i + j], key[j], scores[r][h]);
        }
      }
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          float score = scores[r][h];
#pragma unroll
          for (int offset = kLanes / 2; offset > 0; offset >>= 1) score += __shfl_xor_sync(0xffffffffu, score, offset);
          if constexpr (KvRows::kScaled) score *= key_scales[r];
          score = Score(rows, score);
          scores[r][h] = base + r * kKeys + slot < rows.to ? score : Nothing();
        }
      }
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        Attended<kElements>& own = attended[h];
        float top = own.largest;
#pragma unroll
        for (int r = 0; r < kRounds; ++r) top = fmaxf(top, scores[r][h]);
        const float factor = Factor(own.largest, top);
        own.largest = top;
        own.weights *= factor;
#pragma unroll
        for (int i = 0; i < kElements; ++i) own.sum[i] *= factor;
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
          scores[r][h] = Factor(scores[r][h], top);
          own.weights += scores[r][h];
          if constexpr (KvRows::kScaled) scores[r][h] *= value_scales[r];
        }
      }
#pragma unroll
      for (int r = 0; r < kRounds; ++r)
#pragma unroll
        for (int i = 0; i < kElements; i += 4) {
          float value[4];
          value_packs[r].FourToFloats(i, value);
#pragma unroll
          for (int h = 0; h < kHeads; ++h)
#pragma unroll
            for (int j = 0; j < 4; ++j) attended[h].sum[i + j] = fmaf(scores[r][h], value[j], attended[h].sum[i + j]);
        }
    }

#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (lane == 0) {
        largest[slot][h] = attended[h].largest;
        weights[slot][h] = attended[h].weights;
      }
#pragma unroll
      for (int i = 0; i < kElements; ++i) sums[slot][h][Shared::Place(lane * kElements + i)] = attended[h].sum[i];
    }
  }
};
