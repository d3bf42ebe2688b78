"""`weights.integers.round_to_nearest` in PyTorch, for a GPU: the same codes, scales and zero points, bit for bit.

Each step is one float32 operation of the reference, rounded by itself, and squares are added in the reference's order,
one element of every group after the other. NumPy adds them in this order where a block has two or more groups and its
einsum multiplies and adds in two steps, as on x86-64. Elsewhere the sums may differ in their last bit, and so may the
choice between two ranges of nearly equal error.
"""

from __future__ import annotations

import torch

from tda_export.weights.formats import IntegerFormat
from tda_export.weights.integers import SHRINKS, SMALLEST_SCALE, Codes


def round_to_nearest(rows: torch.Tensor, format: IntegerFormat, *, symmetric: bool = False) -> Codes:
    """Round each element to the nearest code, each group by itself with the best of its ranges.

    Besides `rows`, a few arrays of its size are needed on its device.

    Args:
        rows: float32 [rows, columns], finite, on any device.
        format: The format of the codes.
        symmetric: Let zero points be the middle code.

    Returns:
        The codes, in the CPU's memory. The scale of a group is infinite where it overflows float16.
    """
    count, columns = rows.shape
    groups, group, most = format.groups(columns), format.group, format.levels - 1
    missing = groups * group - columns  # filled with the last column, which changes no range
    filled = torch.cat([rows, rows[:, -1:].expand(-1, missing)], dim=1)
    block = filled.view(-1, group).T.contiguous()  # [group, n]
    low, high = block.amin(dim=0).clamp(max=0), block.amax(dim=0).clamp(min=0)
    best: tuple[torch.Tensor, ...] | None = None
    for shrink in SHRINKS.tolist():
        scales, zero_points = _group_parameters(low, high, format, shrink, symmetric=symmetric)
        left = (block / scales).round_()
        torch.maximum(left, -zero_points, out=left)
        torch.minimum(left, most - zero_points, out=left)
        left.mul_(scales).sub_(block)
        left.view(group, count, groups)[group - missing :, :, -1] = 0
        found = (_sum_of_squares(left), scales, zero_points)
        if best is None:
            best = found
            continue
        better = found[0] < best[0]
        best = tuple(torch.where(better, new, kept) for new, kept in zip(found, best, strict=True))
    assert best is not None
    _, scales, zero_points = best
    codes = (block / scales).round_().add_(zero_points).clamp_(0, most).to(torch.uint8)
    return Codes(
        format,
        codes.T.reshape(count, -1)[:, :columns].contiguous().cpu().numpy(),
        scales.half().view(count, groups).cpu().numpy(),
        zero_points.to(torch.uint8).view(count, groups).cpu().numpy(),
    )


def _group_parameters(
    low: torch.Tensor, high: torch.Tensor, format: IntegerFormat, shrink: float, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `integers.group_parameters` does."""
    most, middle = format.levels - 1, format.levels // 2
    # Divisors are tensors of the device: by a number, CUDA would multiply with its rounded reciprocal.
    if symmetric:
        scales = torch.maximum(-low / low.new_tensor(middle), high / low.new_tensor(most - middle)) * shrink
    else:
        scales = (high - low) / low.new_tensor(most) * shrink
    scales = scales.clamp(min=float(SMALLEST_SCALE)).half().float()
    if symmetric:
        return scales, torch.full_like(scales, middle)
    return scales, (-low * shrink / scales).round_().clamp_(0, most)


def _sum_of_squares(left: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares of each column of float32 [group, n], which is overwritten, from the first row on."""
    first, *others = left.square_()
    for row in others:
        first += row
    return first
