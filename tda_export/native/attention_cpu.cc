// tda::Attention, Attention8 and Attention16 on the CPU, float32: one kernel, over a cache of floats, codes or float16.
//
// Queries are rotated and scaled, keys and values are appended to the cache, and attention reads only the cache. Then
// ONNX Runtime's thread pool gets chunks of the cache of each key-value head, for a few tokens at a time, and the
// thread that ends the last chunk of a head joins them.
#include "attention_cpu.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "attention.h"
#include "attention_chunk_cpu.h"

namespace tda {
namespace {

constexpr int64_t kTokenTile = 16;
constexpr int64_t kMostQueries = 64;      // tokens of a tile that attend to a chunk together
constexpr int64_t kAlone = 64 << 10;      // bytes of keys and values that one thread reads before another has woken up
constexpr int64_t kTokensAlone = 8;       // likewise, whose heads are rotated

#define TDA_ATTENTION(attribute, lanes)                                                                       \
  attribute void AttendChunk(const QueriesOfChunk<FloatRows>& chunk) { AttendChunkOf<lanes>(chunk); }         \
  attribute void AttendChunk(const QueriesOfChunk<HalfRows>& chunk) { AttendChunkOf<lanes>(chunk); }          \
  attribute void AttendChunk(const QueriesOfChunk<CodeRows>& chunk) { AttendChunkOf<lanes>(chunk); }          \
  attribute void JoinChunks(float* results, int64_t chunks, int64_t stride, int64_t size, float* out) {       \
    JoinChunksOf<lanes>(results, chunks, stride, size, out);                                                  \
  }                                                                                                           \
  attribute void Rotate(const Rotation& rotation, const float* x, int64_t size, float scale, float* y) {      \
    RotateHead(rotation, x, size, scale, y);                                                                  \
  }                                                                                                           \
  attribute void Round(const float* x, int64_t size, uint16_t* halves) { RoundHead(x, size, halves); }        \
  attribute void Spread(float* x, int64_t size) { SpreadHead(x, size); }                                      \
  attribute float Quantize(const float* x, int64_t size, int8_t* codes) { return QuantizeHead(x, size, codes); }
TDA_FOR_EACH_TARGET(TDA_ATTENTION)

// A call with its lengths.
struct CpuCall : AttentionCall {
  CpuCall(const KernelContext& context, const AttentionSettings& settings, bool scaled)
      : AttentionCall(context, settings, scaled) {
    total = int64_t{*last_index.As<int32_t>()} + 1;
    past = tokens == buffer ? 0 : total - tokens;
    if (past < 0 || total < 0 || past > past_room || past + tokens > room || total > room) {
      Fail("last_index: ", total, " tokens in all, ", tokens, " of them new, do not go with a past of ", past_room,
           " and a mask of ", buffer);
    }
    if (pairs > 0 && cos.sizes[0] < past + tokens) {
      Fail("cos_cache: it has ", cos.sizes[0], " positions, and past and call ", past + tokens);
    }
  }

  // The positions that a token of the call attends to, [begin, end).
  struct Range {
    int64_t begin, end;
  };
  Range Attended(int64_t token) const {
    const int64_t end = std::min(past + token + 1, total);
    return {settings.window > 0 ? std::max<int64_t>(end - settings.window, 0) : 0, end};
  }

  int64_t past;   // tokens before the call's
  int64_t total;  // of past and call, without padding
};

// Call work(i) for i in [0, count), on the pool, or on this thread where that is faster.
template <class Work>
void ForEach(const KernelContext& context, int64_t count, bool here, const Work& work) {
  if (!here) return context.ParallelFor(count, [&](size_t i) { work(static_cast<int64_t>(i)); });
  for (int64_t i = 0; i < count; ++i) work(i);
}

// Rotate a token's queries and keys, and write them, the keys and the values where attention reads them; `keys` has
// room for keys that are not stored as floats.
template <class Rows>
void PlaceToken(const CpuCall& call, int64_t token, float* queries, float* keys) {
  using Element = typename Rows::Element;
  const AttentionSettings& settings = call.settings;
  const int64_t size = call.size, position = call.past + token;
  Rotation rotation = {nullptr, nullptr, call.pairs, settings.interleaved};
  if (call.pairs > 0) {
    rotation.cos = call.cos.As<const float>() + position * call.pairs;
    rotation.sin = call.sin.As<const float>() + position * call.pairs;
  }
  for (int64_t h = 0; h < settings.heads; ++h) {
    float* query = queries + (token * settings.heads + h) * size;
    Rotate(rotation, call.Query<float>(token) + h * size, size, call.scale, query);
    if constexpr (Rows::kScaled) Spread(query, size);
  }
  for (int64_t h = 0; h < settings.kv_heads; ++h) {
    const int64_t row = h * call.room + position;
    Element* present_key = call.present_key.As<Element>() + row * size;
    Element* present_value = call.present_value.As<Element>() + row * size;
    const float* value = call.Value<float>(token) + h * size;
    float* key;
    if constexpr (Rows::kConverted) {
      key = keys + (token * settings.kv_heads + h) * size;
    } else {
      key = present_key;
    }
    Rotate(rotation, call.Key<float>(token) + h * size, size, 1.0f, key);
    if constexpr (Rows::kScaled) {
      Spread(key, size);
      call.present_key_scale.As<float>()[row] = Quantize(key, size, present_key);
      call.present_value_scale.As<float>()[row] = Quantize(value, size, present_value);
    } else if constexpr (Rows::kConverted) {
      Round(key, size, present_key);
      Round(value, size, present_value);
    } else {
      std::memcpy(present_value, value, size * sizeof(float));
    }
  }
}

// Return the rows of a key-value head, starting at a given one.
template <class Rows>
Rows RowsFrom(const CpuCall& call, const Tensor& elements, const Tensor& scales, int64_t kv_head, int64_t first) {
  const int64_t row = kv_head * call.room + first;
  const auto* begin = elements.As<const typename Rows::Element>() + row * call.size;
  if constexpr (Rows::kScaled) {
    return {begin, scales.As<const float>() + row};
  } else {
    return {begin};
  }
}

bool IsInPlace(const Tensor& past, const Tensor& present) { return past.data == present.data; }

// Copy a head's past, rows of `size` elements, where the present is another buffer, and fill the room after the call's
// tokens with zeros.
template <class T>
void CopyPast(const CpuCall& call, const Tensor& past, const Tensor& present, int64_t head, int64_t size) {
  if (IsInPlace(past, present)) return;
  const int64_t end = call.past + call.tokens;
  T* own = present.As<T>() + head * call.room * size;
  if (call.past > 0) {
    std::memcpy(own, past.As<const T>() + head * call.past_room * size, call.past * size * sizeof(T));
  }
  std::fill(own + end * size, own + call.room * size, T{0});
}

// The chunks that a tile of tokens attends to, and the result of each chunk for each head.
template <class Rows>
class Tile {
 public:
  Tile(const CpuCall& call, int64_t first)
      : call_(call),
        first_(first),
        tokens_(std::min(kTokenTile, call.tokens - first)),
        rows_(ChunkRows(call.size)),
        begin_(call.Attended(first).begin / rows_),
        end_(std::max((call.Attended(first + tokens_ - 1).end + rows_ - 1) / rows_, begin_ + 1)) {}

  int64_t Chunks() const { return end_ - begin_; }
  int64_t Floats() const { return Chunks() * Stride(); }
  // Return the bytes of the keys and values that the tile reads.
  int64_t Bytes() const {
    const int64_t rows = call_.Attended(first_ + tokens_ - 1).end - call_.Attended(first_).begin;
    return rows * call_.size * call_.settings.kv_heads * 2 * int64_t{sizeof(typename Rows::Element)};
  }

  // Compute one chunk's results for the heads that share a key-value head; `queries` are of all tokens.
  void Attend(int64_t chunk, int64_t kv_head, const float* queries, float* results) const {
    const float* queries_of[kMostQueries];
    float* results_of[kMostQueries];
    int64_t count = 0;
    CpuCall::Range shared = {0, 0};  // what these attend to
    const auto attend = [&] {
      if (count > 0) {
        const QueriesOfChunk<Rows> chunk = {
            RowsFrom<Rows>(call_, call_.present_key, call_.present_key_scale, kv_head, shared.begin),
            RowsFrom<Rows>(call_, call_.present_value, call_.present_value_scale, kv_head, shared.begin),
            shared.end - shared.begin,
            call_.size,
            call_.settings.softcap,
            count,
            queries_of,
            results_of,
        };
        AttendChunk(chunk);
      }
      count = 0;
    };
    for (int64_t t = 0; t < tokens_; ++t) {
      const CpuCall::Range range = InChunk(t, chunk);
      if (range.begin >= range.end) continue;
      if (range.begin != shared.begin || range.end != shared.end) attend();
      shared = range;
      for (int64_t h = 0; h < Group(); ++h) {
        if (count == kMostQueries) attend();
        queries_of[count] = queries + (FirstHead(t, kv_head) + h) * call_.size;
        results_of[count++] = Result(results, chunk, t, kv_head) + h * ChunkResult::Floats(call_.size);
      }
    }
    attend();
  }

  // Join the chunks of the heads that share a key-value head. Padding tokens may attend to nothing and give zeros.
  void Join(int64_t kv_head, float* results) const {
    for (int64_t t = 0; t < tokens_; ++t) {
      const CpuCall::Range range = call_.Attended(first_ + t);
      const int64_t begin = range.begin / rows_ - begin_, end = (range.end + rows_ - 1) / rows_ - begin_;
      float* own = Result(results, begin, t, kv_head);
      float* out = call_.attended.As<float>() + FirstHead(t, kv_head) * call_.size;
      if (range.begin >= range.end) std::fill_n(out, Group() * call_.size, 0.0f);
      for (int64_t h = 0; h < Group() && range.begin < range.end; ++h) {
        JoinChunks(own + h * ChunkResult::Floats(call_.size), end - begin, Stride(), call_.size, out + h * call_.size);
      }
    }
  }

 private:
  int64_t Group() const { return call_.settings.heads / call_.settings.kv_heads; }
  // Return the index, among the heads of all tokens, of a token's first head that shares a key-value head.
  int64_t FirstHead(int64_t token, int64_t kv_head) const {
    return (first_ + token) * call_.settings.heads + kv_head * Group();
  }
  int64_t Stride() const { return tokens_ * call_.settings.heads * ChunkResult::Floats(call_.size); }
  float* Result(float* results, int64_t chunk, int64_t token, int64_t kv_head) const {
    const int64_t head = token * call_.settings.heads + kv_head * Group();
    return results + chunk * Stride() + head * ChunkResult::Floats(call_.size);
  }
  CpuCall::Range InChunk(int64_t token, int64_t chunk) const {
    const CpuCall::Range range = call_.Attended(first_ + token);
    const int64_t start = (begin_ + chunk) * rows_;
    return {std::max(range.begin, start), std::min(range.end, start + rows_)};
  }

  const CpuCall& call_;
  const int64_t first_, tokens_;
  const int64_t rows_;         // of a chunk
  const int64_t begin_, end_;  // chunks
};

template <class Rows>
class AttentionCpu : public Kernel {
 public:
  explicit AttentionCpu(const KernelInfo& info) : allocator_(info), settings_(info) {}

  void Compute(const KernelContext& context) override {
    using Element = typename Rows::Element;
    const CpuCall call(context, settings_, Rows::kScaled);
    const int64_t kv_heads = settings_.kv_heads;
    const bool in_place = IsInPlace(call.past_key, call.present_key) && IsInPlace(call.past_value, call.present_value);
    ForEach(context, kv_heads, in_place, [&](int64_t head) {
      CopyPast<Element>(call, call.past_key, call.present_key, head, call.size);
      CopyPast<Element>(call, call.past_value, call.present_value, head, call.size);
      if constexpr (Rows::kScaled) {
        CopyPast<float>(call, call.past_key_scale, call.present_key_scale, head, 1);
        CopyPast<float>(call, call.past_value_scale, call.present_value_scale, head, 1);
      }
    });
    if (call.tokens == 0) return;
    int64_t most = 0;  // floats of a tile
    for (int64_t first = 0; first < call.tokens; first += kTokenTile) {
      most = std::max(most, Tile<Rows>(call, first).Floats());
    }
    const int64_t query_floats = call.tokens * settings_.heads * call.size;
    const int64_t key_floats = Rows::kConverted ? call.tokens * kv_heads * call.size : 0;
    const int64_t floats = query_floats + key_floats + most;
    const size_t counters = (floats * sizeof(float) + 63) / 64 * 64;
    const Scratch scratch(context, allocator_, counters + kv_heads * sizeof(std::atomic<int64_t>), false);
    float* queries = scratch.As<float>();
    float* keys = queries + query_floats;
    float* results = keys + key_floats;
    std::atomic<int64_t>* ended = scratch.As<std::atomic<int64_t>>(counters);

    ForEach(context, call.tokens, call.tokens <= kTokensAlone, [&](int64_t t) { PlaceToken<Rows>(call, t, queries, keys); });
    for (int64_t first = 0; first < call.tokens; first += kTokenTile) {
      const Tile<Rows> tile(call, first);
      const int64_t chunks = tile.Chunks();
      for (int64_t h = 0; h < kv_heads; ++h) new (&ended[h]) std::atomic<int64_t>(0);
      ForEach(context, kv_heads * chunks, tile.Bytes() <= kAlone, [&](int64_t task) {
        const int64_t kv_head = task / chunks;
        tile.Attend(task % chunks, kv_head, queries, results);
        if (ended[kv_head].fetch_add(1) + 1 == chunks) tile.Join(kv_head, results);
      });
    }
  }

 private:
  const Allocator allocator_;
  const AttentionSettings settings_;
};

}  // namespace

std::vector<OpDefinition> AttentionOnCpu() {
  return {OpDefinition("Attention", nullptr, AttentionInputs(kFloat, kFloat), AttentionOutputs(kFloat, kFloat),
                       Create<AttentionCpu<FloatRows>>),
          OpDefinition("Attention16", nullptr, AttentionInputs(kFloat, kHalf), AttentionOutputs(kFloat, kHalf),
                       Create<AttentionCpu<HalfRows>>),
          OpDefinition("Attention8", nullptr, AttentionInputs(kFloat, kInt8), AttentionOutputs(kFloat, kInt8),
                       Create<AttentionCpu<CodeRows>>)};
}

}  // namespace tda
