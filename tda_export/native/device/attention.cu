// tda::Attention and tda::Attention8 on CUDA, for few tokens at a time: rotary embedding, keys and values appended to the
// cache, and attention over parts of the cache that are joined afterwards (flash decoding). KvRows says how the cache
// stores keys and values (kv_rows.cuh).

using KvStored = KvRows::Stored;

struct AttentionArguments {
  const Element* query;      // of the first token; those of the next are query_stride further on, and so on
  const Element* key;
  const Element* value;
  const KvStored* past_key;  // [KV, past_room, D]
  const KvStored* past_value;
  KvStored* present_key;     // [KV, room, D]
  KvStored* present_value;
  const float* past_key_scale;  // [KV, past_room], where rows have scales
  const float* past_value_scale;
  float* present_key_scale;     // [KV, room]
  float* present_value_scale;
  const Element* cos;        // [positions, pairs]
  const Element* sin;
  const int* last_index;     // [1]
  float* partial;            // [tokens, heads, splits, D + 2]: a part's sum, its largest score, and its weights' sum
  Element* attended;         // [tokens, heads, D]
  int tokens, heads, kv_heads, size, pairs, past_room, room, most, buffer, splits;
  // `most`: tokens that there is room, and angles, for.
  int query_stride, key_stride, value_stride;
  int window;       // 0: none
  int interleaved;  // pairs of elements that are rotated together are neighbours
  int appends;      // 1: Attend appends the one token's key and value itself
  float scale, softcap;
};

constexpr int kAttentionThreads = 128;
constexpr int kAttentionWarps = kAttentionThreads / kWarpLanes;
constexpr int kMostSize = 256;  // elements of a head
constexpr float kLog2E = 1.4426950408889634f;

// The score of a missing key: minus infinity.
static __device__ __forceinline__ float Nothing() { return __int_as_float(0xff800000); }

// Tokens before the call, and in all.
struct Lengths {
  int past, total;

  __device__ __forceinline__ explicit Lengths(const AttentionArguments& a) {
    total = min(max(*a.last_index, -1), a.most - 1) + 1;
    past = a.tokens == a.buffer ? 0 : max(total - a.tokens, 0);
  }
};

// Return element d of a head whose first is at x, at a position, rotated.
static __device__ __forceinline__ float Rotated(const AttentionArguments& a, const Element* x, int d, int position) {
  const float own = ToFloat(x[d]);
  if (d >= 2 * a.pairs) return own;
  const int pair = a.interleaved ? d / 2 : d % a.pairs;
  const bool first = a.interleaved ? d % 2 == 0 : d < a.pairs;
  const int distance = a.interleaved ? 1 : a.pairs;
  const float other = ToFloat(x[first ? d + distance : d - distance]);
  const size_t at = static_cast<size_t>(position) * a.pairs + pair;
  return own * ToFloat(a.cos[at]) + (first ? -other : other) * ToFloat(a.sin[at]);
}

// Append a token's key (`part` 0) or value (1) of a head. A whole warp calls this.
template <int kSize>
static __device__ __forceinline__ void Append(const AttentionArguments& a, int token, int position, int kv_head, int part) {
  if (position >= a.room) return;
  const size_t row = static_cast<size_t>(kv_head) * a.room + position;
  WarpHead<kSize / kWarpLanes> head;
  if (part == 0) {
    const Element* key = a.key + static_cast<size_t>(token) * a.key_stride + kv_head * a.size;
    head.Set(a.size, [&](int d) { return Rotated(a, key, d, position); });
    if constexpr (KvRows::kScaled) head.Spread(a.size);
    KvRows::Write(head, a.size, a.present_key + row * a.size, a.present_key_scale + row);
  } else {
    const Element* value = a.value + static_cast<size_t>(token) * a.value_stride + kv_head * a.size;
    head.Set(a.size, [&](int d) { return ToFloat(value[d]); });
    KvRows::Write(head, a.size, a.present_value + row * a.size, a.present_value_scale + row);
  }
}

// Append the keys and values of a token (blockIdx.x) and head (blockIdx.y).
extern "C" __global__ void __launch_bounds__(kAttentionThreads) AppendTokens(AttentionArguments a) {
  WaitForEarlierKernels();
  LetNextKernelStart();
  const Lengths lengths(a);
  const int warp = threadIdx.x / kWarpLanes;
  if (warp < 2) Append<kMostSize>(a, blockIdx.x, lengths.past + blockIdx.x, blockIdx.y, warp);
}

// Copy the past of a head (blockIdx.y) to where the present is, of keys or values (blockIdx.z), and fill the room after
// the call's tokens with zeros.
extern "C" __global__ void __launch_bounds__(kAttentionThreads) CopyPast(AttentionArguments a) {
  WaitForEarlierKernels();
  LetNextKernelStart();
  const Lengths lengths(a);
  const KvStored* past = blockIdx.z == 0 ? a.past_key : a.past_value;
  KvStored* present = blockIdx.z == 0 ? a.present_key : a.present_value;
  past += static_cast<size_t>(blockIdx.y) * a.past_room * a.size;
  present += static_cast<size_t>(blockIdx.y) * a.room * a.size;
  for (int row = blockIdx.x; row < a.room; row += gridDim.x) {
    if (row >= lengths.past && row < lengths.past + a.tokens) continue;
    for (int d = threadIdx.x; d < a.size; d += kAttentionThreads) {
      const size_t at = static_cast<size_t>(row) * a.size + d;
      present[at] = row < lengths.past ? past[at] : KvStored(0);
    }
    if constexpr (KvRows::kScaled) {
      const float* past_scale = blockIdx.z == 0 ? a.past_key_scale : a.past_value_scale;
      float* present_scale = blockIdx.z == 0 ? a.present_key_scale : a.present_value_scale;
      if (threadIdx.x == 0) {
        present_scale[static_cast<size_t>(blockIdx.y) * a.room + row] =
            row < lengths.past ? past_scale[static_cast<size_t>(blockIdx.y) * a.past_room + row] : 0.0f;
      }
    }
  }
}

// The partial result of some keys and values. Scores are base-2 logarithms; weights are relative to the largest.
template <int kElements>
struct Attended {
  float largest = Nothing();
  float weights = 0.0f;
  float sum[kElements] = {};
};

// Where the elements of a head lie in shared memory: by fours, so that neighbouring lanes, which have kElements each, read
// and write neighbouring fours.
template <int kElements, int kLanes>
struct InShared {
  static __device__ __forceinline__ int Place(int d) {
    const int lane = d / kElements, i = d % kElements;
    return (i / 4 * kLanes + lane) * 4 + i % 4;
  }
  static __device__ __forceinline__ int ElementAt(int place) {
    const int four = place / 4;
    return four % kLanes * kElements + four / kLanes * 4 + place % 4;
  }
  // Load a lane's elements i to i + 3.
  static __device__ __forceinline__ void Load(const float* head, int lane, int i, float* four) {
    const float4 loaded = *reinterpret_cast<const float4*>(head + Place(lane * kElements + i));
    four[0] = loaded.x;
    four[1] = loaded.y;
    four[2] = loaded.z;
    four[3] = loaded.w;
  }
};

// Load 16 bytes, which an earlier kernel of the stream or this block may have written.
static __device__ __forceinline__ uint4 LoadBits(const void* address) { return *static_cast<const uint4*>(address); }

// The factor that converts weights relative to `largest` to weights relative to `joint`.
static __device__ __forceinline__ float Factor(float largest, float joint) {
  return exp2f(largest - (joint == Nothing() ? 0.0f : joint));
}

// One block: a part of the cache (blockIdx.x), up to kHeads of the heads that share a key-value head (blockIdx.y), a token
// (blockIdx.z). A row has at most kSize elements, of which each lane reads kElements.
template <int kSize, int kHeads>
static __device__ __forceinline__ void Attend(const AttentionArguments& a) {
  constexpr int kElements = KvRows::kElements;
  constexpr int kLanes = kSize / kElements;
  constexpr int kKeys = kAttentionThreads / kLanes;                   // that are read together
  constexpr int kRounds = (kHeads == 4 ? 4 : 8) * 8 / kElements;      // of them, all under way at once
  constexpr int kChunk = kKeys * kRounds;
  using Shared = InShared<kElements, kLanes>;
  __shared__ __align__(16) float queries[kHeads][kSize];
  __shared__ float largest[kKeys][kHeads], weights[kKeys][kHeads];
  __shared__ __align__(16) float sums[kKeys][kHeads][kSize];
  const int group = a.heads / a.kv_heads;
  const int tiles = (group + kHeads - 1) / kHeads;
  const int kv_head = blockIdx.y / tiles, in_group = blockIdx.y % tiles * kHeads;
  const int first_head = kv_head * group + in_group;
  const int heads = min(kHeads, group - in_group);
  const int token = blockIdx.z, split = blockIdx.x, warp = threadIdx.x / kWarpLanes;
  WaitForEarlierKernels();
  LetNextKernelStart();

  const Lengths lengths(a);
  const int position = lengths.past + token;
  const int end = min(position + 1, lengths.total);
  const int begin = a.window > 0 ? max(end - a.window, 0) : 0;
  // A part depends on the token's own position, not on the other tokens of the call.
  const int part = ((end + a.splits - 1) / a.splits + kChunk - 1) / kChunk * kChunk;
  const int from = max(begin, split * part), to = min(end, (split + 1) * part);
  static_assert(kHeads <= kAttentionWarps, "each warp prepares one query");
  if (warp < kHeads) {
    WarpHead<kSize / kWarpLanes> head;
    if (warp < heads) {
      const Element* query = a.query + static_cast<size_t>(token) * a.query_stride + (first_head + warp) * a.size;
      head.Set(a.size, [&](int d) { return Rotated(a, query, d, position) * a.scale; });
      if constexpr (KvRows::kScaled) head.Spread(a.size);
    }
#pragma unroll
    for (int i = 0; i < kSize / kWarpLanes; ++i) queries[warp][Shared::Place(head.Index(i))] = head.own[i];
  }
  if (a.appends && position >= split * part && position < (split + 1) * part && warp >= kAttentionWarps - 2) {
    Append<kSize>(a, token, position, kv_head, kAttentionWarps - 1 - warp);
  }
  __syncthreads();

  const int lane = threadIdx.x % kLanes, slot = threadIdx.x / kLanes;
  const bool reads = lane * kElements < a.size;
  constexpr bool kInRegisters = kHeads * kElements <= 32;  // the queries; otherwise they stay in shared memory
  float query[kHeads][kElements];
#pragma unroll
  for (int h = 0; h < kHeads; ++h)
#pragma unroll
    for (int i = 0; i < kElements; i += 4) {
      if constexpr (kInRegisters) Shared::Load(queries[h], lane, i, query[h] + i);
    }
  const size_t first_row = static_cast<size_t>(kv_head) * a.room;
  const KvStored* keys = a.present_key + first_row * a.size + lane * kElements;
  const KvStored* values = a.present_value + first_row * a.size + lane * kElements;
  Attended<kElements> attended[kHeads];
#pragma unroll 1
  for (int base = from; base < to; base += kChunk) {
    typename KvRows::Pack key_packs[kRounds], value_packs[kRounds];
    float key_scales[kRounds], value_scales[kRounds];
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int row = base + r * kKeys + slot;
      key_packs[r].bits = make_uint4(0, 0, 0, 0);
      if (reads && row < to) key_packs[r].bits = LoadBits(keys + static_cast<size_t>(row) * a.size);
      if constexpr (KvRows::kScaled) key_scales[r] = row < to ? a.present_key_scale[first_row + row] : 0.0f;
    }
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int row = base + r * kKeys + slot;
      value_packs[r].bits = make_uint4(0, 0, 0, 0);
      if (reads && row < to) value_packs[r].bits = LoadBits(values + static_cast<size_t>(row) * a.size);
      if constexpr (KvRows::kScaled) value_scales[r] = row < to ? a.present_value_scale[first_row + row] : 0.0f;
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
        if constexpr (!kInRegisters) Shared::Load(queries[h], lane, i, query[h] + i);
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
        if (a.softcap > 0.0f) score = a.softcap * tanhf(score / a.softcap);
        scores[r][h] = base + r * kKeys + slot < to ? score * kLog2E : Nothing();
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
  __syncthreads();
  for (int i = threadIdx.x; i < heads * kSize; i += kAttentionThreads) {
    const int h = i / kSize, place = i % kSize, d = Shared::ElementAt(place);
    if (d >= a.size) continue;
    float top = Nothing(), weight = 0.0f, sum = 0.0f;
#pragma unroll
    for (int s = 0; s < kKeys; ++s) top = fmaxf(top, largest[s][h]);
#pragma unroll
    for (int s = 0; s < kKeys; ++s) {
      const float factor = Factor(largest[s][h], top);
      weight += factor * weights[s][h];
      sum += factor * sums[s][h][place];
    }
    const size_t head = static_cast<size_t>(token) * a.heads + first_head + h;
    if (a.splits == 1) {
      a.attended[head * a.size + d] = FromFloat(weight == 0.0f ? 0.0f : sum / weight);
      continue;
    }
    float* own = a.partial + (head * a.splits + split) * (a.size + 2);
    own[d] = sum;
    if (d == 0) {
      own[a.size] = top;
      own[a.size + 1] = weight;
    }
  }
}

// Join the parts of a head (blockIdx.x) and token (blockIdx.y).
extern "C" __global__ void __launch_bounds__(kAttentionThreads) JoinParts(AttentionArguments a) {
  WaitForEarlierKernels();
  LetNextKernelStart();
  const size_t head = static_cast<size_t>(blockIdx.y) * a.heads + blockIdx.x;
  const float* parts = a.partial + head * a.splits * (a.size + 2);
  float top = Nothing();
  for (int s = 0; s < a.splits; ++s) top = fmaxf(top, parts[s * (a.size + 2) + a.size]);
  for (int d = threadIdx.x; d < a.size; d += kAttentionThreads) {
    float weight = 0.0f, sum = 0.0f;
#pragma unroll 8
    for (int s = 0; s < a.splits; ++s) {
      const float* own = parts + s * (a.size + 2);
      const float factor = Factor(own[a.size], top);
      weight += factor * own[a.size + 1];
      sum += factor * own[d];
    }
    // Padding may attend to nothing.
    a.attended[head * a.size + d] = FromFloat(weight == 0.0f ? 0.0f : sum / weight);
  }
}

#define TDA_ATTEND(size, heads)                                                 \
  extern "C" __global__ void __launch_bounds__(kAttentionThreads, 4)            \
      Attend_##size##_##heads(AttentionArguments a) {                           \
    Attend<size, heads>(a);                                                     \
  }

TDA_ATTEND(64, 1)
TDA_ATTEND(64, 2)
TDA_ATTEND(64, 4)
TDA_ATTEND(128, 1)
TDA_ATTEND(128, 2)
TDA_ATTEND(128, 4)
TDA_ATTEND(256, 1)
TDA_ATTEND(256, 2)
TDA_ATTEND(256, 4)
