// tda::Attention on CUDA, for few tokens at a time: rotary embedding, keys and values appended to the cache, and attention
// over parts of the cache that are joined afterwards (flash decoding).

struct AttentionArguments {
  const Element* query;      // of the first token; those of the next are query_stride further on, and so on
  const Element* key;
  const Element* value;
  const Element* past_key;   // [KV, past_room, D]
  const Element* past_value;
  Element* present_key;      // [KV, room, D]
  Element* present_value;
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

// Append element d of a token's key and value of a head.
static __device__ __forceinline__ void Append(const AttentionArguments& a, int token, int position, int kv_head, int d) {
  if (position >= a.room) return;
  const size_t at = (static_cast<size_t>(kv_head) * a.room + position) * a.size + d;
  const Element* key = a.key + static_cast<size_t>(token) * a.key_stride + kv_head * a.size;
  a.present_key[at] = FromFloat(Rotated(a, key, d, position));
  a.present_value[at] = a.value[static_cast<size_t>(token) * a.value_stride + kv_head * a.size + d];
}

// Append the keys and values of a token (blockIdx.x) and head (blockIdx.y).
extern "C" __global__ void __launch_bounds__(kAttentionThreads) AppendTokens(AttentionArguments a) {
  WaitForEarlierKernels();
  LetNextKernelStart();
  const Lengths lengths(a);
  for (int d = threadIdx.x; d < a.size; d += kAttentionThreads) {
    Append(a, blockIdx.x, lengths.past + blockIdx.x, blockIdx.y, d);
  }
}

// Copy the past of a head (blockIdx.y) to where the present is, of keys or values (blockIdx.z), and fill the room after
// the call's tokens with zeros.
extern "C" __global__ void __launch_bounds__(kAttentionThreads) CopyPast(AttentionArguments a) {
  WaitForEarlierKernels();
  LetNextKernelStart();
  const Lengths lengths(a);
  const Element* past = blockIdx.z == 0 ? a.past_key : a.past_value;
  Element* present = blockIdx.z == 0 ? a.present_key : a.present_value;
  past += static_cast<size_t>(blockIdx.y) * a.past_room * a.size;
  present += static_cast<size_t>(blockIdx.y) * a.room * a.size;
  for (int row = blockIdx.x; row < a.room; row += gridDim.x) {
    if (row >= lengths.past && row < lengths.past + a.tokens) continue;
    for (int d = threadIdx.x; d < a.size; d += kAttentionThreads) {
      const size_t at = static_cast<size_t>(row) * a.size + d;
      present[at] = row < lengths.past ? past[at] : Element(0);
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

// The factor that converts weights relative to `largest` to weights relative to `joint`.
static __device__ __forceinline__ float Factor(float largest, float joint) {
  return exp2f(largest - (joint == Nothing() ? 0.0f : joint));
}

// One block: a part of the cache (blockIdx.x), up to kHeads of the heads that share a key-value head (blockIdx.y), a token
// (blockIdx.z). kLanes lanes read a key, eight elements each.
template <int kLanes, int kHeads>
static __device__ __forceinline__ void Attend(const AttentionArguments& a) {
  constexpr int kElements = 8;
  constexpr int kSize = kLanes * kElements;
  constexpr int kKeys = kAttentionThreads / kLanes;  // that are read together
  constexpr int kRounds = kHeads == 4 ? 4 : 8;       // of them, all under way at once
  constexpr int kChunk = kKeys * kRounds;
  __shared__ float queries[kHeads][kSize];
  __shared__ float largest[kKeys][kHeads], weights[kKeys][kHeads];
  __shared__ float sums[kKeys][kHeads][kSize];
  const int group = a.heads / a.kv_heads;
  const int tiles = (group + kHeads - 1) / kHeads;
  const int kv_head = blockIdx.y / tiles, in_group = blockIdx.y % tiles * kHeads;
  const int first_head = kv_head * group + in_group;
  const int heads = min(kHeads, group - in_group);
  const int token = blockIdx.z, split = blockIdx.x;
  WaitForEarlierKernels();
  LetNextKernelStart();

  const Lengths lengths(a);
  const int position = lengths.past + token;
  const int end = min(position + 1, lengths.total);
  const int begin = a.window > 0 ? max(end - a.window, 0) : 0;
  // A part depends on the token's own position, not on the other tokens of the call.
  const int part = ((end + a.splits - 1) / a.splits + kChunk - 1) / kChunk * kChunk;
  const int from = max(begin, split * part), to = min(end, (split + 1) * part);
  for (int i = threadIdx.x; i < kHeads * kSize; i += kAttentionThreads) {
    const int h = i / kSize, d = i % kSize;
    float value = 0.0f;
    if (h < heads && d < a.size) {
      const Element* query = a.query + static_cast<size_t>(token) * a.query_stride + (first_head + h) * a.size;
      value = Rotated(a, query, d, position) * a.scale;
    }
    queries[h][d] = value;
  }
  if (a.appends && position >= split * part && position < (split + 1) * part) {
    for (int d = threadIdx.x; d < a.size; d += kAttentionThreads) Append(a, token, position, kv_head, d);
  }
  __syncthreads();

  const int lane = threadIdx.x % kLanes, slot = threadIdx.x / kLanes;
  const bool reads = lane * kElements < a.size;
  float query[kHeads][kElements];
#pragma unroll
  for (int h = 0; h < kHeads; ++h)
#pragma unroll
    for (int i = 0; i < kElements; ++i) query[h][i] = queries[h][lane * kElements + i];
  const size_t head_start = static_cast<size_t>(kv_head) * a.room * a.size + lane * kElements;
  const Element* keys = a.present_key + head_start;
  const Element* values = a.present_value + head_start;
  Attended<kElements> attended[kHeads];
#pragma unroll 1
  for (int base = from; base < to; base += kChunk) {
    Pack<kElements> key_packs[kRounds], value_packs[kRounds];
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int row = base + r * kKeys + slot;
      key_packs[r].bits = make_uint4(0, 0, 0, 0);
      if (reads && row < to) key_packs[r] = Load<kElements>(keys + static_cast<size_t>(row) * a.size);
    }
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int row = base + r * kKeys + slot;
      value_packs[r].bits = make_uint4(0, 0, 0, 0);
      if (reads && row < to) value_packs[r] = Load<kElements>(values + static_cast<size_t>(row) * a.size);
    }
    float scores[kRounds][kHeads];
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      float key[kElements];
      key_packs[r].ToFloats(key);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float score = 0.0f;
#pragma unroll
        for (int i = 0; i < kElements; ++i) score = fmaf(query[h][i], key[i], score);
#pragma unroll
        for (int offset = kLanes / 2; offset > 0; offset >>= 1) score += __shfl_xor_sync(0xffffffffu, score, offset);
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
      }
    }
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      float value[kElements];
      value_packs[r].ToFloats(value);
#pragma unroll
      for (int h = 0; h < kHeads; ++h)
#pragma unroll
        for (int i = 0; i < kElements; ++i) attended[h].sum[i] = fmaf(scores[r][h], value[i], attended[h].sum[i]);
    }
  }

#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (lane == 0) {
      largest[slot][h] = attended[h].largest;
      weights[slot][h] = attended[h].weights;
    }
#pragma unroll
    for (int i = 0; i < kElements; ++i) sums[slot][h][lane * kElements + i] = attended[h].sum[i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < heads * kSize; i += kAttentionThreads) {
    const int h = i / kSize, d = i % kSize;
    if (d >= a.size) continue;
    float top = Nothing(), weight = 0.0f, sum = 0.0f;
#pragma unroll
    for (int s = 0; s < kKeys; ++s) top = fmaxf(top, largest[s][h]);
#pragma unroll
    for (int s = 0; s < kKeys; ++s) {
      const float factor = Factor(largest[s][h], top);
      weight += factor * weights[s][h];
      sum += factor * sums[s][h][d];
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

#define TDA_ATTEND(lanes, heads)                                                \
  extern "C" __global__ void __launch_bounds__(kAttentionThreads, 4)            \
      Attend_##lanes##_##heads(AttentionArguments a) {                          \
    Attend<lanes, heads>(a);                                                    \
  }

TDA_ATTEND(8, 1)
TDA_ATTEND(8, 2)
TDA_ATTEND(8, 4)
TDA_ATTEND(16, 1)
TDA_ATTEND(16, 2)
TDA_ATTEND(16, 4)
TDA_ATTEND(32, 1)
TDA_ATTEND(32, 2)
TDA_ATTEND(32, 4)
