#include "codes.h"

#include <algorithm>
#include <cmath>

#include "vectors.h"

namespace tda {
namespace {

constexpr size_t kRoom = 64;  // floats

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

LargestScales::LargestScales(const Tensor& scales) : of_group(scales.sizes[1] + kRoom, 0.0f), most(0.0f) {
  const uint16_t* halves = scales.As<const uint16_t>();
  const int64_t groups = scales.sizes[1];
  std::vector<uint16_t> largest(groups, 0);  // bits without the sign: ordered as numbers, what is not finite above all
  for (int64_t row = 0; row < scales.sizes[0]; ++row) {
    for (int64_t g = 0; g < groups; ++g) {
      largest[g] = std::max(largest[g], static_cast<uint16_t>(halves[row * groups + g] & 0x7fff));
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    of_group[g] = largest[g] < 0x7c00 ? HalfToFloat(largest[g]) : HUGE_VALF;
    most = std::max(most, of_group[g]);
  }
}

std::shared_ptr<const LargestScales> LargestScalesOf::Of(const Tensor& scales) const {
  if (!constant_) return std::make_shared<const LargestScales>(scales);
  std::call_once(looked_, [&] { found_ = std::make_shared<const LargestScales>(scales); });
  return found_;
}

std::vector<IoType> CodeTypes() { return {{kUint8}, {kHalf}, {kUint8}}; }

}  // namespace tda
