"""The rounding of a block of rows as one Triton kernel. Triton comes with PyTorch for CUDA on Linux.

PyTorch's operators need dozens of launches for each row of a matrix, which take most of the time on a GPU. Here a
program takes one group of columns through all rows, since no group depends on another. `gptq.round_block` is the
reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tda_export.weights.formats import IntegerFormat
from tda_export.weights.integers import SHRINKS, SMALLEST_SCALE

WARP_COLUMNS = 8  # columns of a group for each warp of a program


@triton.jit
def _nearest(x):  # type: ignore[no-untyped-def]
    """Round to the nearest integer, half to even, for |x| below 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _round_rows(  # type: ignore[no-untyped-def]
    block,  # float32 [rows, columns], as they were before the first of these rows was rounded
    factors,  # float32 [rows, rows], lower triangular: the factor of the earlier row in the later one
    counts,  # float32 [columns]
    shrinks,  # float32 [shrinks]
    errors,  # float32 [rows, columns]
    codes,  # uint8 [rows, columns]
    scales,  # float16 [rows, groups]
    zero_points,  # uint8 [rows, groups]
    rows,
    columns,
    smallest,
    most: tl.constexpr,  # the largest code
    symmetric: tl.constexpr,
    group: tl.constexpr,
    tried: tl.constexpr,  # how many shrinks
    padded_tried: tl.constexpr,  # the next power of 2
    padded_rows: tl.constexpr,
):
    own_group = tl.program_id(0)
    column = own_group * group + tl.arange(0, group)
    counted = tl.load(counts + column)
    number = tl.arange(0, padded_tried)
    shrink = tl.load(shrinks + number, mask=number < tried, other=1.0)
    earlier = tl.arange(0, padded_rows)
    for row in range(rows):
        before = earlier < row
        factor = tl.load(factors + row * rows + earlier, mask=before, other=0.0)
        error = tl.load(errors + earlier[:, None] * columns + column[None, :], mask=before[:, None], other=0.0)
        own = tl.load(block + row * columns + column) - tl.sum(factor[:, None] * error, axis=0)
        low = tl.minimum(tl.min(own, axis=0), 0.0)
        high = tl.maximum(tl.max(own, axis=0), 0.0)
        if symmetric:
            middle: tl.constexpr = (most + 1) // 2
            scale = tl.maximum(tl.div_rn(-low, 1.0 * middle), tl.div_rn(high, 1.0 * (most - middle))) * shrink
        else:
            scale = tl.div_rn(high - low, 1.0 * most) * shrink
        scale = tl.maximum(scale, smallest).to(tl.float16).to(tl.float32)
        if symmetric:
            zero = tl.full([padded_tried], (most + 1) // 2, tl.float32)
        else:
            zero = tl.minimum(tl.maximum(_nearest(tl.div_rn(-low * shrink, scale)), 0.0), 1.0 * most)
        every = tl.broadcast_to(own[None, :], [padded_tried, group])
        wide = tl.broadcast_to(scale[:, None], [padded_tried, group])
        code = tl.minimum(tl.maximum(_nearest(tl.div_rn(every, wide)) + zero[:, None], 0.0), 1.0 * most)
        left = (code - zero[:, None]) * wide - every
        square = tl.sum(left * left * counted[None, :], axis=1)
        best = tl.argmin(tl.where(number < tried, square, float("inf")), axis=0)
        scale = tl.sum(tl.where(number == best, scale, 0.0), axis=0)
        zero = tl.sum(tl.where(number == best, zero, 0.0), axis=0)
        code = _nearest(tl.div_rn(own, tl.broadcast_to(scale, [group]))) + zero
        code = tl.minimum(tl.maximum(code, 0.0), 1.0 * most)
        diagonal = tl.load(factors + row * rows + row)
        error = tl.div_rn(own - (code - zero) * scale, tl.broadcast_to(diagonal, [group]))
        tl.store(errors + row * columns + column, error)
        tl.store(codes + row * columns + column, code.to(tl.uint8))
        tl.store(scales + row * (columns // group) + own_group, scale.to(tl.float16))
        tl.store(zero_points + row * (columns // group) + own_group, zero.to(tl.uint8))
        tl.debug_barrier()  # the next rows read this one's errors


def round_block(
    block: torch.Tensor, factor: torch.Tensor, counts: torch.Tensor, format: IntegerFormat, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do what `gptq.round_block` does, up to rounding."""
    (rows, columns), groups = block.shape, block.shape[1] // format.group
    errors = torch.empty_like(block)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=block.device)
    scales = torch.empty(rows, groups, dtype=torch.float16, device=block.device)
    zero_points = torch.empty(rows, groups, dtype=torch.uint8, device=block.device)
    with torch.cuda.device_of(block):
        _round_rows[(groups,)](
            block,
            factor.T.contiguous(),
            counts,
            torch.from_numpy(SHRINKS).to(block.device),
            errors,
            codes,
            scales,
            zero_points,
            rows,
            columns,
            float(SMALLEST_SCALE),
            most=format.levels - 1,
            symmetric=symmetric,
            group=format.group,
            tried=len(SHRINKS),
            padded_tried=triton.next_power_of_2(len(SHRINKS)),
            padded_rows=triton.next_power_of_2(rows),
            num_warps=format.group // WARP_COLUMNS,
            num_stages=1,
        )
    return codes.view(rows, groups, format.group), scales, zero_points, errors


def compile_kernel(device: torch.device, rows: int, format: IntegerFormat, *, symmetric: bool) -> None:
    """Round a block of one group, which compiles the kernel. Triton needs a C compiler and Python's header files.

    Raises:
        Exception: The kernel cannot be compiled or run.
    """
    block = torch.ones(rows, format.group, device=device)
    round_block(block, torch.eye(rows, device=device), block[0], format, symmetric=symmetric)
