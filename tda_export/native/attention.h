// tda::Attention: what a call is given, and what must hold of it.
//
// Queries attend to keys and values in a cache [1, KV, P, D], to which those of the call's tokens are appended. Each
// token sees itself and those before it, of a window alone where there is one. Tokens of the past are P = 0 where the
// call has as many tokens as the attention mask is long, and otherwise the attended ones less those of the call.
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

// Types of inputs and outputs.
std::vector<IoType> AttentionInputs();
std::vector<IoType> AttentionOutputs();

struct AttentionCall {
  // Read and check the inputs, and allocate the outputs.
  AttentionCall(const KernelContext& context, const AttentionSettings& settings);

  // Where a token of the call attends to: positions [begin, end).
  struct Range {
    int64_t begin, end;
  };
  Range Attended(int64_t token) const;

  // A token's first query, key or value.
  const float* Query(int64_t token) const;
  const float* Key(int64_t token) const;
  const float* Value(int64_t token) const;

  AttentionSettings settings;
  int64_t size;      // D
  int64_t tokens;    // S
  int64_t past;      // tokens before them
  int64_t total;     // of past and call, without padding
  int64_t past_room, room;  // tokens that past and present buffers have room for
  int64_t pairs;     // that are rotated
  float scale;
  Tensor query, key, value, past_key, past_value, cos, sin, attended, present_key, present_value;

 private:
  void CheckProjections();
  void CheckTables(int64_t positions) const;
};

}  // namespace tda
