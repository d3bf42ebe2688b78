"""GPTQ with groups along outputs: rows (input channels) are rounded one after another, and later rows compensate.

The error of y = Σ_i x_i W[i, :] over the calibration's inputs is tr(E^T H E), H = X^T X. Once row i is rounded, the
best change of each later row is a multiple of row i's error, with the factor from the Cholesky factor of the inverse of
H. A group lies inside a row, so its scale is chosen when the row is rounded, from the row's current values, and any
order of rows is possible: those with the largest Hessian diagonal come first.
Source: GPTQ, arXiv 2210.17323, algorithm 1; the order is `act_order` in its code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from tda_export.errors import TdaError, first_line
from tda_export.quantization.code_tensors import CodeTensors
from tda_export.ranks import ALONE, Ranks
from tda_export.weights.formats import IntegerFormat
from tda_export.weights.integers import SHRINKS, SMALLEST_SCALE, Codes

DAMPING = 0.01  # the least share of the Hessian's mean diagonal that is added to its diagonal
MORE_DAMPING, MOST_DAMPING = 10.0, 1.0  # the damping's factor per retry, and its limit
BLOCK = 128  # rows between two updates of all rows that follow

RoundBlock = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class RowOrder:
    """What the rounding of rows needs from the Hessian of their inputs; the same for all matrices with these inputs.

    `order` int64 [in]: rows by falling diagonal. `factor` float32 [in, in]: upper triangular, in that order; factor^T
    factor is the inverse of the damped Hessian.
    """

    order: torch.Tensor
    factor: torch.Tensor


def row_order(hessian: torch.Tensor) -> RowOrder:
    """Order the rows of matrices that read the same inputs, and factor the inverse of their Hessian in float64.

    Args:
        hessian: X^T X, float [in, in] on any device. Inputs that are always 0 are allowed.

    Raises:
        TdaError: The Hessian is not finite, or has no factor; callers put a name and a colon before the message.
    """
    if not bool(hessian.isfinite().all()):
        raise TdaError("its inputs are not finite. Check the checkpoint.")
    order = hessian.diagonal().argsort(descending=True, stable=True)
    backwards = order.flip(0)
    reversed_hessian = hessian[backwards][:, backwards].double()
    mean = float(reversed_hessian.diagonal().mean()) or 1.0
    unit = torch.eye(len(order), dtype=torch.float64, device=hessian.device)
    damping = DAMPING
    while damping <= MOST_DAMPING:
        lower, failed = torch.linalg.cholesky_ex(reversed_hessian + damping * mean * unit)
        if not failed:
            # Read backwards, the lower factor of the reversed matrix is an upper R with R R^T = H; the factor of H's
            # inverse is R^-1.
            factor = torch.linalg.solve_triangular(lower.flip(0, 1), unit, upper=True)
            return RowOrder(order, factor.float())
        damping *= MORE_DAMPING
    raise TdaError("the Hessian of its inputs has no Cholesky factor. Give more --sequences.")


def quantise_rows(weight: torch.Tensor, rows: RowOrder, format: IntegerFormat, *, symmetric: bool = False) -> Codes:
    """Round a matrix row by row, and let later rows compensate for the error.

    Args:
        weight: float32 [in, out], finite, on the device of `rows`.
        rows: The result of `row_order`.
        format: The format of the codes.
        symmetric: Let zero points be the middle code.

    Returns:
        The codes, with rows in the order of `weight`.
    """
    (codes,) = quantise_together([LazyMatrix.of(weight)], rows, format, symmetric=symmetric)
    return codes.pack().unpack()


@dataclass(frozen=True)
class LazyMatrix:
    """A matrix [in, out] of which each rank reads the columns that it rounds.

    `read` gives float32 [in, n] for a slice of n columns, finite, on the device of the rows' order.
    """

    outputs: int
    read: Callable[[slice], torch.Tensor]

    @staticmethod
    def of(weight: torch.Tensor) -> LazyMatrix:
        """Take the columns of a tensor [in, out]."""
        return LazyMatrix(weight.shape[1], lambda columns: weight[:, columns])

    def pieces(self, columns: int, format: IntegerFormat) -> Iterator[LazyMatrix]:
        """Cut it into pieces of whole groups with at most so many columns, but at least a group."""
        size = max(1, columns // format.group) * format.group
        for start in range(0, self.outputs, size):
            yield LazyMatrix(min(size, self.outputs - start), partial(self._read_from, start))

    def _read_from(self, start: int, columns: slice) -> torch.Tensor:
        return self.read(slice(start + columns.start, start + columns.stop))


def quantise_together(
    matrices: Sequence[LazyMatrix],
    rows: RowOrder,
    format: IntegerFormat,
    *,
    symmetric: bool = False,
    ranks: Ranks = ALONE,
) -> list[CodeTensors]:
    """Do the same as `quantise_rows` for several matrices that read the same inputs, side by side: no group depends on
    another.

    Args:
        matrices: The matrices.
        rows: The result of `row_order`.
        format: The format of all codes.
        symmetric: Let zero points be the middle code.
        ranks: The ranks, each of which rounds a share of the groups; all return the same result.

    Returns:
        The codes of each matrix, on the device of `rows`.
    """
    counts = [format.groups(matrix.outputs) for matrix in matrices]
    total = sum(counts)
    share = -(-total // ranks.count)
    starts = [min(total, rank * share) for rank in range(ranks.count + 1)]
    sizes = [end - start for start, end in pairwise(starts)]
    own = _read_groups(matrices, counts, starts[ranks.number], starts[ranks.number + 1], rows, format)
    rounded = _quantise_groups(*own, rows, format, symmetric=symmetric)
    joined = (ranks.side_by_side(each, sizes).split(counts, dim=1) for each in rounded)
    return [
        CodeTensors(format, codes.flatten(1)[:, : matrix.outputs], scales, zero_points)
        for matrix, codes, scales, zero_points in zip(matrices, *joined, strict=True)
    ]


def _read_groups(
    matrices: Sequence[LazyMatrix], counts: Sequence[int], start: int, end: int, rows: RowOrder, format: IntegerFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the groups `start` to `end` of matrices side by side.

    Returns:
        float32 [in, G group], and float32 [G group], 1 for elements and 0 for the padding of groups.
    """
    device = rows.factor.device
    columns, elements = [torch.empty(len(rows.order), 0, device=device)], [torch.empty(0, device=device)]
    before = 0
    for matrix, count in zip(matrices, counts, strict=True):
        first, last = max(start - before, 0), min(end - before, count)
        before += count
        if first < last:
            read = matrix.read(slice(first * format.group, min(last * format.group, matrix.outputs)))
            filled = _whole_groups(read, format)
            columns.append(filled)
            elements.append((torch.arange(filled.shape[1], device=device) < read.shape[1]).float())
    return torch.cat(columns, dim=1), torch.cat(elements)


def passed_on(errors: torch.Tensor, rows: RowOrder) -> torch.Tensor:
    """Return a matrix's errors under GPTQ, given those that rounding alone makes in each row.

    GPTQ takes a multiple of each row's error off the rows that follow in its order. So its errors are a triangular
    matrix times the errors of rounding, which have about the size that they have in rounding to nearest.

    Args:
        errors: What rounding adds to each weight, float32 [in, out] on the device of `rows`.
        rows: The result of `row_order`.
    """
    own = errors[rows.order] / rows.factor.diagonal()[:, None]
    return (rows.factor.T @ own)[rows.order.argsort()]


def _whole_groups(weight: torch.Tensor, format: IntegerFormat) -> torch.Tensor:
    """Pad the last group with copies of the last column. They change as it does, and so widen no range."""
    missing = format.groups(weight.shape[1]) * format.group - weight.shape[1]
    return torch.cat([weight, weight[:, -1:].expand(-1, missing)], dim=1)


def _quantise_groups(
    columns: torch.Tensor, counts: torch.Tensor, rows: RowOrder, format: IntegerFormat, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise whole groups [in, G group]; `counts` [G group] says which elements are no padding.

    Returns:
        Codes uint8 [in, G, group], scales and zero points [in, G].
    """
    inputs, groups = len(columns), columns.shape[1] // format.group
    left = columns[rows.order].contiguous()
    codes = torch.empty(inputs, groups, format.group, dtype=torch.uint8, device=columns.device)
    scales = torch.empty(inputs, groups, dtype=torch.float16, device=columns.device)
    zero_points = torch.empty(inputs, groups, dtype=torch.uint8, device=columns.device)
    rounding = block_rounding(columns.device, format, symmetric)
    for start in range(0, inputs if groups else 0, BLOCK):
        end = min(start + BLOCK, inputs)
        own = rows.factor[start:end, start:end]
        *rounded, errors = rounding(left[start:end], own, counts, format, symmetric=symmetric)
        codes[start:end], scales[start:end], zero_points[start:end] = rounded
        left[end:].addmm_(rows.factor[start:end, end:].T, errors, alpha=-1)
    back = rows.order.argsort()
    return codes[back], scales[back], zero_points[back]


def block_rounding(device: torch.device, format: IntegerFormat, symmetric: bool) -> RoundBlock:
    """Return what rounds a block of rows fastest on a device."""
    if device.type == "cuda" and why_slow(device, frozenset([format]), symmetric) is None:
        from tda_export.quantization import gptq_triton

        return gptq_triton.round_block
    return round_block


@functools.cache
def why_slow(device: torch.device, formats: frozenset[IntegerFormat], symmetric: bool) -> str | None:
    """Return why a GPU has to round by PyTorch's operators, in one line; None if it can run the Triton kernel for these
    formats, and for a CPU."""
    if device.type != "cuda" or not formats:
        return None
    try:
        from tda_export.quantization import gptq_triton

        for format in formats:
            gptq_triton.compile_kernel(device, BLOCK, format, symmetric=symmetric)
    except Exception as error:  # anything may stop Triton or the compiler that it calls
        return first_line(error)
    return None


def round_block(
    block: torch.Tensor, factor: torch.Tensor, counts: torch.Tensor, format: IntegerFormat, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round rows one after another, and let those that follow in the block compensate.

    Args:
        block: The rows, float32 [rows, G group], G whole groups. They may be overwritten.
        factor: The part of `RowOrder.factor` that belongs to them, [rows, rows].
        counts: float32 [G group], 1 for elements and 0 for padding.
        format: The format of the codes.
        symmetric: Let zero points be the middle code.

    Returns:
        Codes [rows, G, group], scales and zero points [rows, G], and the rows' errors divided by the factor's
        diagonal, float32 [rows, G group].
    """
    groups = block.shape[1] // format.group
    counts = counts.view(groups, format.group)
    shrinks = torch.from_numpy(SHRINKS).to(block.device)[:, None]
    errors, found = torch.empty_like(block), []
    for row, own in enumerate(block):
        rounded = search_groups(own.view(groups, format.group), counts, format, shrinks, symmetric=symmetric)
        decoded = (rounded[0] - rounded[2][:, None]) * rounded[1][:, None]
        errors[row] = (own - decoded.flatten()) / factor[row, row]
        block[row + 1 :].addr_(factor[row, row + 1 :], errors[row], alpha=-1)
        found.append(rounded)
    codes, scales, zero_points = (torch.stack(each) for each in zip(*found, strict=True))
    return codes, scales, zero_points, errors


def search_groups(
    grouped: torch.Tensor, counts: torch.Tensor, format: IntegerFormat, shrinks: torch.Tensor, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round groups to the nearest codes with the best range: `integers.round_to_nearest` in PyTorch.

    Args:
        grouped: float32 [groups, group], one row.
        counts: float32 [groups, group], 1 for elements and 0 for padding, whose errors do not count.
        format: The format of the codes.
        shrinks: Ranges to try, as shares of a group's own range, float32 [n, 1].
        symmetric: Let zero points be the middle code.

    Returns:
        Codes [groups, group], scales and zero points [groups], all float32.
    """
    most = format.levels - 1
    low, high = grouped.amin(dim=1).clamp(max=0), grouped.amax(dim=1).clamp(min=0)
    if symmetric:
        middle = format.levels // 2
        scales = torch.maximum(-low / middle, high / (most - middle)) * shrinks
    else:
        scales = (high - low) / most * shrinks
    scales = scales.clamp(min=float(SMALLEST_SCALE)).half().float()  # [n, groups]
    if symmetric:
        zero_points = torch.full_like(scales, format.levels // 2)
    else:
        zero_points = (-low * shrinks / scales).round().clamp(0, most)
    codes = ((grouped / scales[..., None]).round() + zero_points[..., None]).clamp(0, most)  # [n, groups, group]
    squares = ((codes - zero_points[..., None]) * scales[..., None] - grouped).square() * counts
    best = squares.sum(dim=2).argmin(dim=0)  # [groups]
    groups = torch.arange(len(grouped), device=grouped.device)
    return codes[best, groups], scales[best, groups], zero_points[best, groups]
