// tda::Attention, Attention8 and Attention16: the inputs of a call, and their checks.
//
// Queries attend to keys and values in a cache [1, KV, P, D], to which those of the call's tokens are appended. Each
// token attends to itself and earlier tokens, within the window if there is one. tda::Attention16 has a cache of
// float16 beside float32, tda::Attention8 one of codes, and their scales [1, KV, P] (attention_rows_cpu.h). The past has
// no tokens where the call has as many tokens as the attention mask is long; otherwise it has the attended tokens minus
// those of the call.
#pragma once

#include "op.h"

namespace tda {

struct AttentionSettings {
  explicit AttentionSettings(const KernelInfo& info);

  int64_t heads, kv_heads;
  int64_t window;  // 0 is none
  float scale;     // 0 is 1 / sqrt(D)
  float softcap;   // 0 is none
  bool rotary, interleaved;
};

// Types of inputs and outputs, for activations of `type` and a cache of `cache`, with scales if that is kInt8.
std::vector<IoType> AttentionInputs(ElementType type, ElementType cache);
std::vector<IoType> AttentionOutputs(ElementType type, ElementType cache);

struct AttentionCall {
  // Read and check the inputs that are on the CPU for any provider, and the shapes of the others; allocate the outputs.
  // `scaled`: the cache has scales.
  AttentionCall(const KernelContext& context, const AttentionSettings& settings, bool scaled = false);

  // A token's first query, key or value, of elements of T.
  template <class T>
  const T* Query(int64_t token) const {
    return query.As<const T>() + token * QueryStride();
  }
  template <class T>
  const T* Key(int64_t token) const {
    return key.present ? key.As<const T>() + token * KeyStride() : Query<T>(token) + settings.heads * size;
  }
  template <class T>
  const T* Value(int64_t token) const {
    return key.present ? value.As<const T>() + token * KeyStride() : Key<T>(token) + settings.kv_heads * size;
  }
  // Elements from one token to the next, of queries, and of keys and values.
  int64_t QueryStride() const { return query.sizes[2]; }
  int64_t KeyStride() const { return key.present ? key.sizes[2] : query.sizes[2]; }

  AttentionSettings settings;
  int64_t size;    // D
  int64_t tokens;  // S
  int64_t buffer;  // the length of the attention mask
  int64_t past_room, room;  // tokens that past and present buffers have room for
  int64_t pairs;   // that are rotated
  float scale;
  Tensor query, key, value, past_key, past_value, last_index, cos, sin, attended, present_key, present_value;
  Tensor past_key_scale, past_value_scale, present_key_scale, present_value_scale;  // where the cache has scales

 private:
  void CheckProjections();
  void CheckScales(const KernelContext& context);
  void CheckTables() const;
};

}  // namespace tda
