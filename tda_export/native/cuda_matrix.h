// The host's view of a weight matrix that device code reads (device/format.cuh), and of the width of its loads.
#pragma once

#include "codes.h"
#include "indexed_ffn_device.h"

namespace tda {

struct StoredMatrix {
  const void* weights = nullptr;
  const void* scales = nullptr;
  const void* zero_points = nullptr;
  int columns = 0;
  int group_shift = 0;
};

inline StoredMatrix StoredElements(const Tensor& weight) {
  return {weight.data, nullptr, nullptr, static_cast<int>(weight.sizes[1]), 0};
}

inline StoredMatrix StoredCodes(const CodeLayout& layout, const Tensor& codes, const Tensor& scales,
                                const Tensor& zero_points) {
  return {codes.data, scales.data, zero_points.data, static_cast<int>(layout.columns), __builtin_ctzll(layout.group)};
}

// Whether every row begins where loads of so many columns may, and is a whole number of them; `bits` is of a column.
inline bool SuitsLoads(const StoredMatrix& matrix, int64_t width, int64_t bits) {
  const int64_t bytes = std::max<int64_t>(1, width * bits / 8);
  return matrix.columns % width == 0 && reinterpret_cast<uintptr_t>(matrix.weights) % bytes == 0;
}

// Name a type and the bits of a code (0: elements) to device code; refuse a type that the current GPU does not have.
inline std::vector<std::string> FormatDefines(ElementType type, int bits) {
  RequireDtype(type);
  return {"TDA_BF16=" + std::to_string(type == kBfloat16), "TDA_BITS=" + std::to_string(bits)};
}

}  // namespace tda
