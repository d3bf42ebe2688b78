// The host's view of device/indexed_ffn.cu: its constants, its arguments, and how its second kernel is laid out.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda_module.h"

namespace tda {

constexpr int64_t kWarp = 32;
constexpr int64_t kThreads = 256;
constexpr int64_t kWarps = kThreads / kWarp;
constexpr int64_t kRowLoads = 8;
constexpr int64_t kRowsTogether = 4;
constexpr int64_t kWide = 8;  // elements of a wide load, 16 bytes
constexpr int64_t kMostBlocks = 65535;  // along the grid's y
constexpr int64_t kTile = 4;  // tokens that share one read of the weights

struct FfnArguments {
  const void* x;
  const int32_t* mask_indices;
  const void* gate;
  const void* up;
  const void* down;
  const void* gate_bias;
  const void* up_bias;
  const void* down_bias;
  const float* neuron_scale;
  const float* threshold;
  float* h;
  float* partial;
  unsigned* arrived;
  void* y;
  int tokens, hidden, neurons, indices, counters;
  int early;
};

constexpr int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bytes up to the next boundary that suits any load.
constexpr size_t Aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

inline bool SuitsWideLoads(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0; }

// The grid and the memory of one call of the second kernel. They depend on shapes alone, not on what the tensors hold,
// so that a captured call serves any indices of the same count.
struct DownSumsLayout {
  DownSumsLayout(const CudaKernel& kernel, int64_t tokens, int64_t hidden, int64_t indices, bool wide)
      : tile(tokens == 1 ? 1 : kTile),
        tiles(CeilDivide(tokens, tile)),
        slice(kWarp * (wide ? kWide : 1)),
        slices(CeilDivide(hidden, slice)),
        // As many blocks as run at once, but none without a batch of rows for each of its warps.
        groups(std::clamp<int64_t>(kernel.resident_blocks / (slices * tiles), 1,
                                   std::max<int64_t>(1, CeilDivide(indices, kWarps * kRowLoads)))),
        h_bytes(Aligned(tokens * indices * sizeof(float))),
        partial_bytes(Aligned(tiles * slices * groups * tile * slice * sizeof(float))),
        bytes(h_bytes + partial_bytes + tiles * slices * sizeof(unsigned)) {}

  void Place(const Scratch& scratch, FfnArguments& arguments) const {
    arguments.h = scratch.As<float>();
    arguments.partial = scratch.As<float>(h_bytes);
    arguments.arrived = scratch.As<unsigned>(h_bytes + partial_bytes);
    arguments.counters = static_cast<int>(tiles * slices);
  }

  int64_t tile, tiles, slice, slices, groups;
  size_t h_bytes, partial_bytes, bytes;
};

}  // namespace tda
