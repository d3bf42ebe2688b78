// tda::IndexedFFN on the CPU, float32: rows are read in place, each once for a tile of tokens.
//
// The neurons of the mask are cut into chunks for ONNX Runtime's thread pool. A chunk computes its activations and adds
// its neurons' outputs into a partial result of its own; the partial results are added in order at the end, so that the
// result does not depend on which thread ran what.
//
// A chunk goes through its neurons in blocks: gates of the block, then up rows of those that are still needed, then down
// rows. Within each of the three, a few rows are read at once while those of the next groups are asked for: rows of a
// mask lie apart, and one row alone is too short for the processor to see ahead. Where neurons lie side by side it does
// see ahead, and one neuron after another is the faster way. Both read at about the memory's bandwidth.
#include "indexed_ffn_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <thread>

#include "indexed_ffn.h"
#include "rows_cpu.h"

namespace tda {
namespace {

constexpr int64_t kTokenTile = 16;
constexpr int64_t kChunkBytes = 64 << 10;  // of weights, at least, so that handing out work costs little
constexpr int64_t kChunksPerThread = 4;    // evens out threads that are slowed down by others
constexpr int kBlock = 32;                 // neurons

using Format = FloatFormat;

// What the chunks of one tile of tokens share.
struct Tile {
  Activation activation;
  int64_t hidden;
  int64_t tokens;
  const float* x;          // [tokens, hidden]
  const int32_t* mask;     // valid indices alone
  bool gated;
  Format gate;             // [F, hidden]
  Format up;               // [F, hidden]
  Format down;             // [F, hidden]
  const float* gate_bias;  // [F] or null
  const float* up_bias;    // [F] or null
  const float* scale;      // [F] or null
  float threshold;         // 0 is off
};

// Up to kBlock rows of one matrix, and what is read after them.
struct RowList {
  Format matrix;
  const int32_t* neurons;
  int count;
  Format next_matrix;
  const int32_t* next_neurons;
  int next_count;  // 0 where nothing follows

  TDA_INLINE Format::Row Row(int i) const { return matrix.At(neurons[i]); }

  // The row that is read `i` rows after the first, in this list or the next; a row of this list where there is none.
  TDA_INLINE Format::Row Ahead(int i) const {
    if (i < count) return Row(i);
    if (i - count < next_count) return next_matrix.At(next_neurons[i - count]);
    return Row(count - 1);
  }
};

// Visit the rows of a list in groups: dots with every token of x into values [tokens, kBlock], or, with kAdd, sums with
// the values as scales into y [tokens, hidden].
template <int kLanes, int kCount, bool kAdd>
TDA_INLINE void VisitGroup(const RowList& list, int first, int64_t tokens, const float* x, float* y, float* values) {
  const int64_t hidden = list.matrix.columns;
  Format::Row rows[kCount], ahead[kCount];
  for (int r = 0; r < kCount; ++r) {
    rows[r] = list.Row(first + r);
    ahead[r] = list.Ahead(first + r + kGroupsAhead * kRowsAtOnce);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    float* own = values + t * kBlock + first;
    if (kAdd) {
      AddScaled<kLanes, kCount>(y + t * hidden, rows, ahead, 0, hidden, own);
    } else {
      Dots<kLanes, kCount>(x + t * hidden, rows, ahead, hidden, own);
    }
  }
}

template <int kLanes, bool kAdd>
TDA_INLINE void VisitRows(const RowList& list, int64_t tokens, const float* x, float* y, float* values) {
  int i = 0;
  for (; i + kRowsAtOnce <= list.count; i += kRowsAtOnce) {
    VisitGroup<kLanes, kRowsAtOnce, kAdd>(list, i, tokens, x, y, values);
  }
  for (; i < list.count; ++i) VisitGroup<kLanes, 1, kAdd>(list, i, tokens, x, y, values);
}

// Apply the activation function to products [tokens, kBlock] and drop neurons below the threshold. Neurons that no
// token needs leave the list. Returns how many are left.
int ActivateAndDrop(const Tile& tile, const float* bias, int32_t* neurons, int count, float* values) {
  int kept = 0;
  for (int i = 0; i < count; ++i) {
    const int32_t neuron = neurons[i];
    bool needed = false;
    for (int64_t t = 0; t < tile.tokens; ++t) {
      float h = Activate(tile.activation, values[t * kBlock + i] + (bias == nullptr ? 0.0f : bias[neuron]));
      if (tile.threshold > 0.0f && std::fabs(h) * tile.scale[neuron] < tile.threshold) h = 0.0f;
      values[t * kBlock + kept] = h;  // kept <= i: nothing that is still to be read
      needed = needed || h != 0.0f;
    }
    neurons[kept] = neuron;
    kept += needed;
  }
  return kept;
}

// Add the outputs of neurons that lie side by side, one after another.
template <int kLanes>
TDA_INLINE void AddSideBySide(const Tile& tile, int64_t begin, int64_t end, float* y) {
  const int64_t hidden = tile.hidden;
  const float* bias = tile.gated ? tile.gate_bias : tile.up_bias;
  const Format first_matrix = tile.gated ? tile.gate : tile.up;
  for (int64_t k = begin; k < end; ++k) {
    const int32_t neuron = tile.mask[k];
    const Format::Row first = first_matrix.At(neuron), up = tile.up.At(neuron), down = tile.down.At(neuron);
    const Format::Row next = first_matrix.At(neuron + (k + 1 < end ? 1 : 0));
    for (int64_t t = 0; t < tile.tokens; ++t) {
      const float* x = tile.x + t * hidden;
      float h, product;
      Dots<kLanes, 1>(x, &first, tile.gated ? &up : &down, hidden, &h);
      h = Activate(tile.activation, h + (bias == nullptr ? 0.0f : bias[neuron]));
      if (h == 0.0f || (tile.threshold > 0.0f && std::fabs(h) * tile.scale[neuron] < tile.threshold)) continue;
      if (tile.gated) {
        Dots<kLanes, 1>(x, &up, &down, hidden, &product);
        h *= product + (tile.up_bias == nullptr ? 0.0f : tile.up_bias[neuron]);
      }
      AddScaled<kLanes, 1>(y + t * hidden, &down, &next, 0, hidden, &h);
    }
  }
}

// Add the outputs of a block of at most kBlock neurons, and ask early for those that follow it up to `end`.
template <int kLanes>
TDA_INLINE void AddBlock(const Tile& tile, int64_t start, int64_t stop, int64_t end, float* y) {
  int32_t neurons[kBlock];
  float h[kTokenTile * kBlock], up[kTokenTile * kBlock];
  int count = static_cast<int>(stop - start);
  std::copy_n(tile.mask + start, count, neurons);
  const Format first_matrix = tile.gated ? tile.gate : tile.up;
  const Format second_matrix = tile.gated ? tile.up : tile.down;
  const RowList first = {first_matrix, neurons, count, second_matrix, neurons, count};
  VisitRows<kLanes, false>(first, tile.tokens, tile.x, y, h);
  count = ActivateAndDrop(tile, tile.gated ? tile.gate_bias : tile.up_bias, neurons, count, h);
  if (count == 0) return;
  if (tile.gated) {
    const RowList second = {tile.up, neurons, count, tile.down, neurons, count};
    VisitRows<kLanes, false>(second, tile.tokens, tile.x, y, up);
    for (int64_t t = 0; t < tile.tokens; ++t) {
      for (int i = 0; i < count; ++i) {
        const float bias = tile.up_bias == nullptr ? 0.0f : tile.up_bias[neurons[i]];
        h[t * kBlock + i] *= up[t * kBlock + i] + bias;
      }
    }
  }
  const int next_count = static_cast<int>(std::min<int64_t>(kBlock, end - stop));
  const RowList last = {tile.down, neurons, count, first_matrix, tile.mask + stop, next_count};
  VisitRows<kLanes, true>(last, tile.tokens, tile.x, y, h);
}

// Add the outputs of the neurons mask[begin, end) to y [tokens, hidden].
template <int kLanes>
TDA_INLINE void AddNeuronsOf(const Tile& tile, int64_t begin, int64_t end, float* y) {
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t stop = std::min<int64_t>(start + kBlock, end);
    if (tile.mask[stop - 1] - tile.mask[start] == stop - 1 - start) {
      AddSideBySide<kLanes>(tile, start, stop, y);
    } else {
      AddBlock<kLanes>(tile, start, stop, end, y);
    }
  }
}

#define TDA_ADD_NEURONS(attribute, lanes)                                                 \
  attribute void AddNeurons(const Tile& tile, int64_t begin, int64_t end, float* y) { \
    AddNeuronsOf<lanes>(tile, begin, end, y);                                             \
  }
TDA_FOR_EACH_TARGET(TDA_ADD_NEURONS)

class IndexedFfnCpu : public Kernel {
 public:
  explicit IndexedFfnCpu(const KernelInfo& info)
      : allocator_(info),
        activation_(ParseActivation(info.String("activation"))),
        layer_(info.Int("layer")),
        most_chunks_(kChunksPerThread * std::max(1u, std::thread::hardware_concurrency())) {}

  void Compute(const KernelContext& context) override {
    const IndexedFfnArguments call(context, layer_);
    const int64_t hidden = call.hidden;
    float* y = context.OutputLike(0, call.x).As<float>();
    if (call.tokens == 0) return;

    const int64_t tile_tokens = std::min(call.tokens, kTokenTile);
    const int64_t matrices = call.gate.present ? 3 : 2;
    // The same for any number of tokens, so that the call's other tokens change no bit of a token's result.
    const int64_t bytes = call.indices * hidden * matrices * int64_t{sizeof(float)};
    const int64_t chunks = std::clamp<int64_t>(bytes / kChunkBytes, 1, most_chunks_);
    const int64_t partial_floats = tile_tokens * hidden;
    const Scratch scratch(context, allocator_, (chunks * partial_floats + call.indices) * sizeof(float), false);
    float* partial = scratch.As<float>();  // [chunks, tile_tokens, hidden]
    int32_t* mask = reinterpret_cast<int32_t*>(partial + chunks * partial_floats);
    const int64_t kept = KeepValid(call, mask);

    for (int64_t start = 0; start < call.tokens; start += tile_tokens) {
      const Tile tile = MakeTile(call, mask, start, std::min(tile_tokens, call.tokens - start));
      const int64_t floats = tile.tokens * hidden;
      context.ParallelFor(chunks, [&](size_t chunk) {
        float* own = partial + chunk * partial_floats;
        std::memset(own, 0, floats * sizeof(float));
        const int64_t first = static_cast<int64_t>(chunk) * kept / chunks;
        AddNeurons(tile, first, static_cast<int64_t>(chunk + 1) * kept / chunks, own);
      });
      float* out = y + start * hidden;
      for (int64_t t = 0; t < tile.tokens; ++t) {
        if (call.down_bias.present) {
          std::memcpy(out + t * hidden, call.down_bias.data, hidden * sizeof(float));
        } else {
          std::memset(out + t * hidden, 0, hidden * sizeof(float));
        }
      }
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const float* part = partial + chunk * partial_floats;
        for (int64_t i = 0; i < floats; ++i) out[i] += part[i];
      }
    }
  }

 private:
  // Copy the indices that are neurons to `mask`, and return how many there are.
  static int64_t KeepValid(const IndexedFfnArguments& call, int32_t* mask) {
    const int32_t* given = call.mask_indices.As<const int32_t>();
    int64_t kept = 0;
    for (int64_t k = 0; k < call.indices; ++k) {
      if (given[k] >= call.neurons || given[k] < -1) {
        Fail("mask_indices[", k, "] is ", given[k], ", out of bounds: expected -1 (padding) or 0 to ",
             call.neurons - 1);
      }
      if (given[k] >= 0) mask[kept++] = given[k];
    }
    return kept;
  }

  Tile MakeTile(const IndexedFfnArguments& call, const int32_t* mask, int64_t start, int64_t tokens) const {
    const float threshold = call.token_thresholds.present ? call.token_thresholds.As<const float>()[layer_] : 0.0f;
    return {activation_,
            call.hidden,
            tokens,
            call.x.As<const float>() + start * call.hidden,
            mask,
            call.gate.present,
            {call.gate.As<const float>(), call.hidden},
            {call.up.As<const float>(), call.hidden},
            {call.down.As<const float>(), call.hidden},
            call.gate_bias.As<const float>(),
            call.up_bias.As<const float>(),
            call.neuron_scale.As<const float>(),
            threshold};
  }

  const Allocator allocator_;
  const Activation activation_;
  const int64_t layer_;
  const int64_t most_chunks_;
};

}  // namespace

OpDefinition IndexedFfnOnCpu() {
  return OpDefinition("IndexedFFN", nullptr, IndexedFfnInputs(kFloat), {{kFloat}}, Create<IndexedFfnCpu>);
}

}  // namespace tda
