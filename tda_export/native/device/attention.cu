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

constexpr int kMostSize = 256;  // elements of a head

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

// One block: a part of the cache (blockIdx.x), up to kHeads of the heads that share a key-value head (blockIdx.y), a token
// (blockIdx.z). A row has at most kSize elements.
template <int kSize, int kHeads>
static __device__ __forceinline__ void Attend(const AttentionArguments& a) {
  using Loop = AttendLoop<kSize, kHeads>;
  using Shared = InShared<kSize>;
  constexpr int kChunk = Loop::kChunk, kSlots = Loop::kSlots;
  __shared__ __align__(16) float queries[kHeads][kSize];
  __shared__ float units[kHeads], largest[kSlots][kHeads], weights[kSlots][kHeads];
  __shared__ __align__(16) float sums[kSlots][kHeads][Loop::kStride];
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
    float unit = 1.0f;
    if (warp < heads) {
      const Element* query = a.query + static_cast<size_t>(token) * a.query_stride + (first_head + warp) * a.size;
      head.Set(a.size, [&](int d) { return Rotated(a, query, d, position) * a.scale; });
      if constexpr (KvRows::kScaled) head.Spread(a.size);
      if constexpr (Loop::kUnits) unit = head.TakeUnit();
    }
#pragma unroll
    for (int i = 0; i < kSize / kWarpLanes; ++i) queries[warp][Shared::Place(head.Index(i))] = head.own[i];
    if (threadIdx.x % kWarpLanes == 0) units[warp] = unit;
  }
  if (a.appends && position >= split * part && position < (split + 1) * part && warp >= kAttentionWarps - 2) {
    Append<kSize>(a, token, position, kv_head, kAttentionWarps - 1 - warp);
  }
  __syncthreads();

  const size_t first_row = static_cast<size_t>(kv_head) * a.room;
  KvPart rows = {a.present_key + first_row * a.size, a.present_value + first_row * a.size, nullptr, nullptr, a.size,
                 from, to, a.softcap};
  if constexpr (KvRows::kScaled) {
    rows.key_scales = a.present_key_scale + first_row;
    rows.value_scales = a.present_value_scale + first_row;
  }
  Loop::Run(rows, queries, units, largest, weights, sums);
  __syncthreads();
  for (int i = threadIdx.x; i < heads * kSize; i += kAttentionThreads) {
    const int h = i / kSize, place = i % kSize, d = Shared::ElementAt(place);
    if (d >= a.size) continue;
    float top = Nothing(), weight = 0.0f, sum = 0.0f;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) top = fmaxf(top, largest[s][h]);
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
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
