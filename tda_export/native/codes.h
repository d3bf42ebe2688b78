// Matrices of integer formats, as weights/formats.py describes them: unsigned codes of 4 or 8 bits in groups along a row,
// element = (code - zero point) * scale, both of its group. Every row is a unit of whole bytes.
#pragma once

#include <atomic>

#include "op.h"

namespace tda {

struct CodeLayout {
  // Read the attributes `columns` and `group` of a node whose codes have so many bits.
  CodeLayout(const KernelInfo& info, int bits);

  // Throw unless the tensors have this layout.
  void Check(const Tensor& codes, const Tensor& scales, const Tensor& zero_points) const;

  int64_t Packed(int64_t count) const { return (count * bits + 7) / 8; }
  int64_t Groups() const { return (columns + group - 1) / group; }

  int bits;
  int64_t columns;
  int64_t group;
};

// The largest size of a matrix's scales: infinite where one is no finite number, or where most are so much smaller that
// they have no common unit (digits_cpu.h). Looked for once if they are constant.
class LargestScale {
 public:
  explicit LargestScale(const KernelInfo& info, size_t input) : constant_(info.IsConstant(input)) {}

  float Of(const Tensor& scales) const;

 private:
  const bool constant_;
  mutable std::atomic<float> found_ = -1.0f;  // below zero before the first call
};

// Types of a matrix's tensors: codes, scales, zero points.
std::vector<IoType> CodeTypes();

}  // namespace tda
