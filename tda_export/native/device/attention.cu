// tda::Attention and tda::Attention8 on CUDA, for few tokens at a time: rotary embedding, keys and values appended to the
// cache, and attention over parts of the cache that are joined afterwards (flash decoding). KvRows says how the cache
// stores keys and values (kv_rows.cuh). With TDA_CLUSTERS, whether the GPU has them, the blocks that attend to the parts
// are a cluster and join them; without, a second kernel does.

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
  float* partial;            // [tokens, heads, splits, D + 2]: a part's sum, its largest score, and its weights' sum; used
                             // without clusters only
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

  __device__ __forceinline__ explicit Lengths(const AttentionArguments& a) : Lengths(a, *a.last_index) {}

  __device__ __forceinline__ Lengths(const AttentionArguments& a, int last_index) {
    total = min(max(last_index, -1), a.most - 1) + 1;
    past = a.tokens == a.buffer ? 0 : max(total - a.tokens, 0);
  }
};

// The rows of the cache that a block attends to. They depend on the token's own position, not on the call's other tokens.
struct Part {
  int position, from, to;
  int end;  // of the room for its rows, of which those from `to` on are not there yet

  __device__ __forceinline__ Part(const AttentionArguments& a, const Lengths& lengths, int token, int split,
                                  int part_rows) {
    position = lengths.past + token;
    const int last = min(position + 1, lengths.total);
    const int begin = a.window > 0 ? max(last - a.window, 0) : 0;
    const int rows = ((last - begin + a.splits - 1) / a.splits + part_rows - 1) / part_rows * part_rows;
    from = begin + split * rows;
    end = from + rows;
    to = min(last, end);
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
  WarpHead<kSize / kWarp> head;
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
  const int warp = threadIdx.x / kWarp;
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

// Tell the second-level cache which rows a block will read, before earlier kernels have ended. Should one of them still
// change the length, nothing but time is lost: the load goes past the first-level cache, which might keep it.
template <int kPartRows, int kThreads>
static __device__ __forceinline__ void PrefetchPart(const AttentionArguments& a, int kv_head, int token, int split) {
  constexpr int kLine = 128, kMostRows = 256;  // of long parts the first, as many as are there when they are read
  const Part part(a, Lengths(a, __ldcg(a.last_index)), token, split, kPartRows);
  const int row_bytes = a.size * static_cast<int>(sizeof(KvStored));
  const size_t first = (static_cast<size_t>(kv_head) * a.room + part.from) * row_bytes;
  const int bytes = min(part.to - part.from, kMostRows) * row_bytes;
  for (int at = threadIdx.x * kLine; at < bytes; at += kThreads * kLine) {
    const char* key = reinterpret_cast<const char*>(a.present_key) + first + at;
    const char* value = reinterpret_cast<const char*>(a.present_value) + first + at;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(key));
    asm volatile("prefetch.global.L2 [%0];" ::"l"(value));
  }
}

// Store the result of some elements of a head from element d on.
template <int kElements>
static __device__ __forceinline__ void StoreAttended(const AttentionArguments& a, size_t head, int d,
                                                     const Attended<kElements>& joined) {
  // Padding may attend to nothing.
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    a.attended[head * a.size + d + i] = FromFloat(joined.weights == 0.0f ? 0.0f : joined.sum[i] / joined.weights);
  }
}

#if TDA_CLUSTERS
// Where the parts of a cluster meet: each block joins a share of the sums, four at a time, and gets them with the largest
// score and the weights of their head from every block.
template <int kMostSums>
struct ClusterParts {
  static constexpr int kMostFours = kMostSums / 4 + kMostRanks;

  __align__(16) float sums[kMostFours][4];  // [ranks, fours of a rank]
  __align__(8) float scores[kMostFours][2];
  ClusterInbox inbox;

  __device__ __forceinline__ int OwnFours(int sums_sent) const { return (sums_sent / 4 + gridDim.x - 1) / gridDim.x; }

  // Called when the block begins: each block will send so many sums.
  __device__ __forceinline__ void Begin(int sums_sent) {
    const int most = OwnFours(sums_sent), fours = min(most, sums_sent / 4 - static_cast<int>(blockIdx.x) * most);
    inbox.Begin(max(fours, 0) * static_cast<int>(gridDim.x) * 6);
  }

  // Send four of the block's sums to the block that joins them.
  __device__ __forceinline__ void Send(int sums_sent, int four, const Attended<4>& part) const {
    const int own_fours = OwnFours(sums_sent), rank = four / own_fours;
    const int at = blockIdx.x * own_fours + four - rank * own_fours;
    const float scores_sent[2] = {part.largest, part.weights};
    inbox.Send(sums[at], rank, part.sum);
    inbox.Send(scores[at], rank, scores_sent);
  }

  // Join four of the block's own share.
  __device__ __forceinline__ Attended<4> Joined(int own_four, int own_fours) const {
    const auto at = [&](int rank) { return rank * own_fours + own_four; };
    return Join<4>(
        gridDim.x, [&](int rank) { return scores[at(rank)][0]; }, [&](int rank) { return scores[at(rank)][1]; },
        [&](int rank, float* sum) { LoadFour(sums[at(rank)], sum); });
  }
};
#endif

// One block: a part of the cache (blockIdx.x), up to kHeads of the heads that share a key-value head (blockIdx.y), a token
// (blockIdx.z). A row has at most kSize elements.
template <int kSize, int kHeads, int kThreads>
static __device__ __forceinline__ void Attend(const AttentionArguments& a) {
  using Loop = AttendLoop<kSize, kHeads, kThreads>;
  using Shared = InShared<kSize>;
  constexpr int kPartRows = Loop::kPartRows, kSlots = Loop::kSlots, kWarps = kThreads / kWarp;
  __shared__ __align__(16) float queries[kHeads][kSize];
  __shared__ float units[kHeads], largest[kSlots][kHeads], weights[kSlots][kHeads];
  struct alignas(16) Sums {
    float of[kSlots][kHeads][Loop::kStride];
  };
  // The host asks for so much (attention_cuda.cc).
  static_assert(sizeof(Sums) == sizeof(float) * kHeads * (TDA_KV_MATRICES ? kThreads / kWarp * (kSize + 8)
                                                                          : kThreads * KvRows::kElements),
                "the host knows this size");
  auto& sums = BlockMemory<Sums, (kThreads > kAttentionThreads)>().of;
  const int group = a.heads / a.kv_heads;
  const int tiles = (group + kHeads - 1) / kHeads;
  const int kv_head = blockIdx.y / tiles, in_group = blockIdx.y % tiles * kHeads;
  const int first_head = kv_head * group + in_group;
  const int heads = min(kHeads, group - in_group);
  const int token = blockIdx.z, split = blockIdx.x, warp = threadIdx.x / kWarp;
#if TDA_CLUSTERS
  __shared__ ClusterParts<kHeads * kSize> cluster_parts;
  if (a.splits > 1) cluster_parts.Begin(heads * kSize);
#endif
  if (a.past_key == a.present_key) PrefetchPart<kPartRows, kThreads>(a, kv_head, token, split);
  WaitForEarlierKernels();
  LetNextKernelStart();

  const Part part(a, Lengths(a), token, split, kPartRows);
  static_assert(kHeads <= kWarps, "each warp prepares one query");
  if (warp < kHeads) {
    WarpHead<kSize / kWarp> head;
    float unit = 1.0f;
    if (warp < heads) {
      const Element* query = a.query + static_cast<size_t>(token) * a.query_stride + (first_head + warp) * a.size;
      head.Set(a.size, [&](int d) { return Rotated(a, query, d, part.position) * a.scale; });
      if constexpr (KvRows::kScaled) head.Spread(a.size);
      if constexpr (Loop::kUnits) unit = head.TakeUnit();
    }
#pragma unroll
    for (int i = 0; i < kSize / kWarp; ++i) queries[warp][Shared::Place(head.Index(i))] = head.own[i];
    if (threadIdx.x % kWarp == 0) units[warp] = unit;
  }
  if (a.appends && part.position >= part.from && part.position < part.end && warp >= kWarps - 2) {
    Append<kSize>(a, token, part.position, kv_head, kWarps - 1 - warp);
  }
  __syncthreads();

  const size_t first_row = static_cast<size_t>(kv_head) * a.room;
  KvPart rows = {a.present_key + first_row * a.size, a.present_value + first_row * a.size, nullptr, nullptr, a.size,
                 part.from, part.to, a.softcap};
  if constexpr (KvRows::kScaled) {
    rows.key_scales = a.present_key_scale + first_row;
    rows.value_scales = a.present_value_scale + first_row;
  }
  Loop::Run(rows, queries, units, largest, weights, sums);
  __syncthreads();
#if TDA_CLUSTERS
  if (a.splits > 1) cluster_parts.inbox.WaitForBlocks();
#endif
  for (int four = threadIdx.x; four < heads * kSize / 4; four += kThreads) {
    const int h = four * 4 / kSize, place = four * 4 % kSize, d = Shared::ElementAt(place);
    const Attended<4> joined = Join<4>(
        kSlots, [&](int s) { return largest[s][h]; }, [&](int s) { return weights[s][h]; },
        [&](int s, float* sum) { LoadFour(&sums[s][h][place], sum); });
    const size_t head = static_cast<size_t>(token) * a.heads + first_head + h;
    if (a.splits == 1) {
      if (d < a.size) StoreAttended(a, head, d, joined);
      continue;
    }
#if TDA_CLUSTERS
    cluster_parts.Send(heads * kSize, four, joined);
#else
    if (d >= a.size) continue;
    float* own = a.partial + (head * a.splits + split) * (a.size + 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) own[d + i] = joined.sum[i];
    if (d == 0) {
      own[a.size] = joined.largest;
      own[a.size + 1] = joined.weights;
    }
#endif
  }
#if TDA_CLUSTERS
  if (a.splits == 1) return;
  cluster_parts.inbox.WaitForFloats();
  const int own_fours = cluster_parts.OwnFours(heads * kSize);
  for (int i = threadIdx.x; i < own_fours; i += kThreads) {
    const int four = split * own_fours + i, h = four * 4 / kSize, d = Shared::ElementAt(four * 4 % kSize);
    if (h >= heads || d >= a.size) continue;
    StoreAttended(a, static_cast<size_t>(token) * a.heads + first_head + h, d, cluster_parts.Joined(i, own_fours));
  }
#endif
}

#if !TDA_CLUSTERS
constexpr int kMostParts = 64;  // of a head and token (attention_cuda.cc)

// Join the parts of a head (blockIdx.x) and token (blockIdx.y). The lanes of each warp hold the parts' largest scores and
// weights, so that loads of sums do not wait for one another.
extern "C" __global__ void __launch_bounds__(kAttentionThreads) JoinParts(AttentionArguments a) {
  WaitForEarlierKernels();
  LetNextKernelStart();
  const size_t head = static_cast<size_t>(blockIdx.y) * a.heads + blockIdx.x;
  const float* parts = a.partial + head * a.splits * (a.size + 2);
  const auto at = [&](int part, int i) { return parts[part * (a.size + 2) + i]; };
  constexpr int kOfLane = kMostParts / kWarp;
  float factors[kOfLane], weights[kOfLane], top = Nothing();
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    const int part = threadIdx.x % kWarp + kWarp * i;
    factors[i] = part < a.splits ? at(part, a.size) : Nothing();  // the largest score, until `top` is known
    weights[i] = part < a.splits ? at(part, a.size + 1) : 0.0f;
    top = fmaxf(top, factors[i]);
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset >>= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) factors[i] = Factor(factors[i], top);

  for (int first = 0; first < a.size; first += kAttentionThreads) {  // all lanes take part
    const int d = first + threadIdx.x;
    Attended<1> joined;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const int own_parts = min(a.splits - kWarp * i, kWarp);
#pragma unroll 8
      for (int p = 0; p < own_parts; ++p) {
        const float factor = __shfl_sync(0xffffffffu, factors[i], p);
        joined.weights += factor * __shfl_sync(0xffffffffu, weights[i], p);
        joined.sum[0] += factor * (d < a.size ? at(p + kWarp * i, d) : 0.0f);
      }
    }
    if (d < a.size) StoreAttended(a, head, d, joined);
  }
}
#endif

// `blocks` on a multiprocessor at once.
#define TDA_ATTEND_KERNEL(size, heads, threads, blocks)              \
  extern "C" __global__ void __launch_bounds__(threads, blocks)      \
      Attend_##size##_##heads##_##threads(AttentionArguments a) {    \
    Attend<size, heads, threads>(a);                                 \
  }
#define TDA_ATTEND(size, heads, threads, blocks) TDA_ATTEND_KERNEL(size, heads, threads, blocks)

// A model needs the kernels for one number of heads at once; without TDA_HEADS there are those for all.
#ifdef TDA_HEADS
#define TDA_ATTEND_ALL(size, threads, blocks) TDA_ATTEND(size, TDA_HEADS, threads, blocks)
#else
#define TDA_ATTEND_ALL(size, threads, blocks) \
  TDA_ATTEND(size, 1, threads, blocks)        \
  TDA_ATTEND(size, 2, threads, blocks)        \
  TDA_ATTEND(size, 4, threads, blocks)
#endif

TDA_ATTEND_ALL(64, 128, 4)
TDA_ATTEND_ALL(128, 128, 4)
// Large heads of floats take more registers by tensor cores.
TDA_ATTEND_ALL(256, 128, (TDA_KV_MATRICES && !TDA_KV_CODES ? 2 : 4))

#if TDA_CLUSTERS
// Wide blocks (attention_cuda.cc), whose sums are in dynamic memory. Of large heads, half the threads have as many bytes
// under way.
TDA_ATTEND_ALL(64, 512, 1)
TDA_ATTEND_ALL(128, 512, 1)
TDA_ATTEND_ALL(256, 256, 1)
#endif
