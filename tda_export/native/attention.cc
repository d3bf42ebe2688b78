#include "attention.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace tda {
namespace {

// As in tda_export/graph/operators.py.
enum Input : size_t { kQuery, kKey, kValue, kPastKey, kPastValue, kLastIndex, kBuffer, kCos, kSin };
enum ScaleInput : size_t { kPastKeyScale = kLastIndex, kPastValueScale };  // those after them come two later
constexpr size_t kScales = 2;

bool IsShape(const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  return tensor.rank == sizes.size() && std::equal(sizes.begin(), sizes.end(), tensor.sizes);
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

std::vector<IoType> AttentionInputs(ElementType type, ElementType cache) {
  std::vector<IoType> inputs = {
      {type},        // query
      {type, true},  // key
      {type, true},  // value
      {cache},       // past_key
      {cache},       // past_value
  };
  if (cache == kInt8) inputs.insert(inputs.end(), kScales, {kFloat});
  inputs.insert(inputs.end(), {
                                  {kInt32},               // last_index
                                  {kInt32, false, true},  // buffer
                                  {type, true},           // cos_cache
                                  {type, true},           // sin_cache
                              });
  return inputs;
}

std::vector<IoType> AttentionOutputs(ElementType type, ElementType cache) {
  std::vector<IoType> outputs = {{type}, {cache}, {cache}};
  if (cache == kInt8) outputs.insert(outputs.end(), kScales, {kFloat});
  return outputs;
}

AttentionCall::AttentionCall(const KernelContext& context, const AttentionSettings& settings, bool scaled)
    : settings(settings),
      query(context.Input(kQuery)),
      key(context.Input(kKey)),
      value(context.Input(kValue)),
      past_key(context.Input(kPastKey)),
      past_value(context.Input(kPastValue)),
      last_index(context.Input(kLastIndex + scaled * kScales)),
      cos(context.Input(kCos + scaled * kScales)),
      sin(context.Input(kSin + scaled * kScales)) {
  CheckProjections();
  const int64_t kv_heads = settings.kv_heads;
  past_room = past_key.rank == 4 ? past_key.sizes[2] : 0;
  for (const auto& [name, past_tensor] : {std::pair("past_key", &past_key), std::pair("past_value", &past_value)}) {
    if (!IsShape(*past_tensor, {1, kv_heads, past_room, size})) {
      Fail(name, ": expected shape [1, ", kv_heads, ", past, ", size, "], got ", past_tensor->Shape());
    }
  }
  const Tensor buffer_length = context.Input(kBuffer + scaled * kScales);
  if (buffer_length.Count() != 1) Fail("buffer: expected one number, got shape ", buffer_length.Shape());
  if (last_index.Count() != 1) Fail("last_index: expected one number, got shape ", last_index.Shape());
  buffer = *buffer_length.As<int32_t>();
  room = std::max(past_room, buffer);
  CheckTables();
  pairs = settings.rotary ? cos.sizes[1] : 0;
  scale = settings.scale == 0.0f ? 1.0f / std::sqrt(static_cast<float>(size)) : settings.scale;
  attended = context.Output(0, {1, tokens, settings.heads * size});
  present_key = context.Output(1, {1, kv_heads, room, size});
  present_value = context.Output(2, {1, kv_heads, room, size});
  if (scaled) CheckScales(context);
}

void AttentionCall::CheckScales(const KernelContext& context) {
  const int64_t kv_heads = settings.kv_heads;
  past_key_scale = context.Input(kPastKeyScale);
  past_value_scale = context.Input(kPastValueScale);
  for (const auto& [name, scale] :
       {std::pair("past_key_scale", &past_key_scale), std::pair("past_value_scale", &past_value_scale)}) {
    if (!IsShape(*scale, {1, kv_heads, past_room})) {
      Fail(name, ": expected shape [1, ", kv_heads, ", ", past_room, "], got ", scale->Shape());
    }
  }
  present_key_scale = context.Output(3, {1, kv_heads, room});
  present_value_scale = context.Output(4, {1, kv_heads, room});
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

void AttentionCall::CheckTables() const {
  if (!settings.rotary) return;
  if (!cos.present || !sin.present) Fail("cos_cache and sin_cache: rotary embedding needs both");
  if (cos.rank != 2 || 2 * cos.sizes[1] > size) {
    Fail("cos_cache: expected shape [positions, at most ", size / 2, "], got ", cos.Shape());
  }
  if (sin.Shape() != cos.Shape()) Fail("sin_cache: expected shape ", cos.Shape(), ", got ", sin.Shape());
  if (cos.sizes[0] < buffer) {
    Fail("cos_cache: it has ", cos.sizes[0], " positions, and the attention mask ", buffer);
  }
}

}  // namespace tda
