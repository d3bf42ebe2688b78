#include "codes.h"

#include <algorithm>
#include <cmath>

#include "vectors.h"

namespace tda {
namespace {

constexpr double kWidestScales = 256.0;  // of the mean

}  // namespace

CodeLayout::CodeLayout(const KernelInfo& info, int bits)
    : bits(bits), columns(info.Int("columns")), group(info.Int("group")) {
  if (columns < 1) Fail("columns: expected at least 1, got ", columns);
  if (group != 32 && group != 64 && group != 128) Fail("group: expected 32, 64 or 128, got ", group);
}

void CodeLayout::Check(const Tensor& codes, const Tensor& scales, const Tensor& zero_points) const {
  const int64_t bytes = Packed(columns);
  if (codes.rank != 2 || codes.sizes[1] != bytes) {
    Fail("w: expected shape [rows, ", bytes, "], ", columns, " codes of ", bits, " bits a row, got ", codes.Shape());
  }
  const int64_t rows = codes.sizes[0];
  const auto check = [&](const char* name, const Tensor& tensor, int64_t expected, const char* what) {
    if (tensor.rank == 2 && tensor.sizes[0] == rows && tensor.sizes[1] == expected) return;
    Fail(name, ": expected shape [", rows, ", ", expected, "], ", what, " of ", Groups(), " groups a row, got ",
         tensor.Shape());
  };
  check("scales", scales, Groups(), "those");
  check("zero_points", zero_points, Packed(Groups()), "the bytes");
}

float LargestScale::Of(const Tensor& scales) const {
  const float known = found_.load(std::memory_order_relaxed);
  if (known >= 0.0f) return known;
  const uint16_t* halves = scales.As<const uint16_t>();
  const int64_t count = scales.Count();
  float largest = 0.0f;
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    const float size = HalfToFloat(halves[i] & 0x7fff);
    sum += size;
    largest = std::max(largest, size);
  }
  const float found = largest * count <= kWidestScales * sum ? largest : HUGE_VALF;  // not where one is a NaN
  if (constant_) found_.store(found, std::memory_order_relaxed);
  return found;
}

std::vector<IoType> CodeTypes() { return {{kUint8}, {kHalf}, {kUint8}}; }

}  // namespace tda
