#include "attention.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace tda {
namespace {

// As in tda_export/graph/operators.py.
enum Input : size_t { kQuery, kKey, kValue, kPastKey, kPastValue, kLastIndex, kBuffer, kCos, kSin };

bool IsShape(const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  return tensor.rank == sizes.size() && std::equal(sizes.begin(), sizes.end(), tensor.sizes);
}

int64_t OneNumber(const Tensor& tensor, const char* name) {
  if (tensor.Count() != 1) Fail(name, ": expected one number, got shape ", tensor.Shape());
  return *tensor.As<const int32_t>();
}

}  // namespace

AttentionSettings::AttentionSettings(const KernelInfo& info)
    : heads(info.Int("num_heads")),
      kv_heads(info.Int("kv_num_heads")),
      window(std::max<int64_t>(info.Int("local_window_size"), 0)),
      scale(info.Float("scale")),
      softcap(info.Float("softcap")),
      rotary(info.Flag("do_rotary")),
      interleaved(info.Flag("rotary_interleaved")) {
  if (kv_heads < 1 || heads < 1 || heads % kv_heads) {
    Fail("num_heads: ", heads, " heads cannot share ", kv_heads, " key-value heads evenly");
  }
}

std::vector<IoType> AttentionInputs() {
  return {
      {kFloat},        // query
      {kFloat, true},  // key
      {kFloat, true},  // value
      {kFloat},        // past_key
      {kFloat},        // past_value
      {kInt32},        // last_index
      {kInt32},        // buffer
      {kFloat, true},  // cos_cache
      {kFloat, true},  // sin_cache
  };
}

std::vector<IoType> AttentionOutputs() { return {{kFloat}, {kFloat}, {kFloat}}; }

AttentionCall::AttentionCall(const KernelContext& context, const AttentionSettings& settings)
    : settings(settings),
      query(context.Input(kQuery)),
      key(context.Input(kKey)),
      value(context.Input(kValue)),
      past_key(context.Input(kPastKey)),
      past_value(context.Input(kPastValue)),
      cos(context.Input(kCos)),
      sin(context.Input(kSin)) {
  CheckProjections();
  const int64_t kv_heads = settings.kv_heads;
  past_room = past_key.rank == 4 ? past_key.sizes[2] : 0;
  for (const auto& [name, past_tensor] : {std::pair("past_key", &past_key), std::pair("past_value", &past_value)}) {
    if (!IsShape(*past_tensor, {1, kv_heads, past_room, size})) {
      Fail(name, ": expected shape [1, ", kv_heads, ", past, ", size, "], got ", past_tensor->Shape());
    }
  }
  const int64_t buffer = OneNumber(context.Input(kBuffer), "buffer");
  total = OneNumber(context.Input(kLastIndex), "last_index") + 1;
  past = tokens == buffer ? 0 : total - tokens;
  room = std::max(past_room, buffer);
  if (past < 0 || total < 0 || past > past_room || past + tokens > room || total > room) {
    Fail("last_index: ", total, " tokens in all, ", tokens, " of them new, do not go with a past of ", past_room,
         " and a mask of ", buffer);
  }
  CheckTables(buffer);
  pairs = settings.rotary ? cos.sizes[1] : 0;
  scale = settings.scale == 0.0f ? 1.0f / std::sqrt(static_cast<float>(size)) : settings.scale;
  attended = context.Output(0, {1, tokens, settings.heads * size});
  present_key = context.Output(1, {1, kv_heads, room, size});
  present_value = context.Output(2, {1, kv_heads, room, size});
}

void AttentionCall::CheckProjections() {
  const int64_t heads = settings.heads, kv_heads = settings.kv_heads;
  if (query.rank != 3 || query.sizes[0] != 1) Fail("query: expected shape [1, tokens, width], got ", query.Shape());
  if (key.present != value.present) Fail("key and value: one is missing; give both or neither");
  tokens = query.sizes[1];
  const int64_t of_query = key.present ? heads : heads + 2 * kv_heads, width = query.sizes[2];
  size = width / of_query;
  if (size == 0 || width % of_query) Fail("query: ", of_query, " heads do not fit into shape ", query.Shape());
  if (!key.present) return;
  if (!IsShape(key, {1, tokens, kv_heads * size})) {
    Fail("key: expected shape [1, ", tokens, ", ", kv_heads * size, "], got ", key.Shape());
  }
  if (value.Shape() != key.Shape()) Fail("value: expected shape ", key.Shape(), ", got ", value.Shape());
}

void AttentionCall::CheckTables(int64_t positions) const {
  if (!settings.rotary) return;
  if (!cos.present || !sin.present) Fail("cos_cache and sin_cache: rotary embedding needs both");
  if (cos.rank != 2 || 2 * cos.sizes[1] > size) {
    Fail("cos_cache: expected shape [positions, at most ", size / 2, "], got ", cos.Shape());
  }
  if (sin.Shape() != cos.Shape()) Fail("sin_cache: expected shape ", cos.Shape(), ", got ", sin.Shape());
  if (cos.sizes[0] < std::max(positions, past + tokens)) {
    Fail("cos_cache: it has ", cos.sizes[0], " positions, and the attention mask ", positions);
  }
}

AttentionCall::Range AttentionCall::Attended(int64_t token) const {
  const int64_t end = std::min(past + token + 1, total);
  return {settings.window > 0 ? std::max<int64_t>(end - settings.window, 0) : 0, end};
}

const float* AttentionCall::Query(int64_t token) const {
  return query.As<const float>() + token * query.sizes[2];
}

const float* AttentionCall::Key(int64_t token) const {
  return key.present ? key.As<const float>() + token * key.sizes[2] : Query(token) + settings.heads * size;
}

const float* AttentionCall::Value(int64_t token) const {
  const int64_t width = settings.kv_heads * size;
  return key.present ? value.As<const float>() + token * width : Key(token) + width;
}

}  // namespace tda
