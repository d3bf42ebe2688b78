// Matrices of integer formats, as weights/formats.py describes them: unsigned codes of 4 or 8 bits in groups along a row,
// element = (code - zero point) * scale, with its group's zero point and scale. Every row takes whole bytes.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "op.h"

namespace tda {

struct CodeLayout {
  // Read the attributes `columns` and `group` of a node whose codes have `bits` bits.
  CodeLayout(const KernelInfo& info, int bits);

  // Throw unless the tensors have this layout.
  void Check(const Tensor& codes, const Tensor& scales, const Tensor& zero_points) const;

  int64_t Packed(int64_t count) const { return (count * bits + 7) / 8; }
  int64_t Groups() const { return (columns + group - 1) / group; }

  int bits;
  int64_t columns;
  int64_t group;
};

// The largest sizes of the scales of a matrix's columns, by group, over its rows.
struct LargestScales {
  explicit LargestScales(const Tensor& scales);

  std::vector<float> of_group;  // with room to read vectors
  float most;                   // of all; not finite where a scale is not
};

// Holds a matrix's largest scales, which are searched once where the scales are constant.
class LargestScalesOf {
 public:
  LargestScalesOf(const KernelInfo& info, size_t input) : constant_(info.IsConstant(input)) {}

  std::shared_ptr<const LargestScales> Of(const Tensor& scales) const;

 private:
  const bool constant_;
  mutable std::once_flag looked_;
  mutable std::shared_ptr<const LargestScales> found_;
};

// Types of a matrix's tensors: codes, scales, zero points.
std::vector<IoType> CodeTypes();

}  // namespace tda
