"""GPTQ with groups along outputs: rows, input channels, are rounded one after another, and later ones make up for it.

The error of y = Σ_i x_i W[i, :] over the calibration's inputs is tr(E^T H E), H = X^T X. Once row i is rounded, the
best change of the rows after it is a multiple of its error, which the Cholesky factor of the inverse of H has. As a
group lies inside a row its scale is chosen when the row's turn comes, for the row as it then is, and any order of rows
will do: those that matter most come first.
Source: GPTQ, arXiv 2210.17323, algorithm 1; the order is `act_order` of its code.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tda_export.errors import TdaError
from tda_export.weights.formats import IntegerFormat
from tda_export.weights.integers import SHRINKS, SMALLEST_SCALE, Codes

DAMPING = 0.01  # of the mean of the Hessian's diagonal, added to it, at least
MORE_DAMPING, MOST_DAMPING = 10.0, 1.0  # where that is not enough for a factor to exist
BLOCK = 128  # rows between two updates of all rows that follow


@dataclass(frozen=True)
class RowOrder:
    """What the rounding of rows needs of the Hessian of their inputs, whatever matrix they are of.

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
        TdaError: It holds no finite numbers, or has no factor; the message goes behind a name and a colon.
    """
    if not bool(hessian.isfinite().all()):
        raise TdaError("its inputs are not finite. Check the checkpoint.")
    order = hessian.diagonal().argsort(descending=True, stable=True)
    ordered = hessian[order][:, order].double()
    mean = float(ordered.diagonal().mean()) or 1.0
    damping = DAMPING
    while damping <= MOST_DAMPING:
        damped = ordered + damping * mean * torch.eye(len(ordered), dtype=torch.float64, device=ordered.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return RowOrder(order, factor.float())
        damping *= MORE_DAMPING
    raise TdaError("the Hessian of its inputs has no Cholesky factor. Give more --sequences.")


def quantise_rows(weight: torch.Tensor, rows: RowOrder, format: IntegerFormat, *, symmetric: bool = False) -> Codes:
    """Round a matrix row by row, and let the rows that follow make up for the error.

    Args:
        weight: float32 [in, out], finite, on the device of `rows`.
        rows: From `row_order`.
        format: Of the codes.
        symmetric: Let zero points be the middle code.

    Returns:
        The codes, with rows in the order of `weight`.
    """
    inputs, outputs = weight.shape
    groups = format.groups(outputs)
    # Copies of the last column fill the last group: they change as it does, and so widen no range.
    filled = torch.cat([weight, weight[:, -1:].expand(-1, groups * format.group - outputs)], dim=1)
    left = filled[rows.order]
    codes = torch.empty(inputs, groups, format.group, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(inputs, groups, dtype=torch.float16, device=weight.device)
    zero_points = torch.empty(inputs, groups, dtype=torch.uint8, device=weight.device)
    shrinks = torch.from_numpy(SHRINKS).to(weight.device)[:, None]
    diagonal = rows.factor.diagonal()
    for start in range(0, inputs, BLOCK):
        end = min(start + BLOCK, inputs)
        block, errors = left[start:end], torch.empty_like(left[start:end])
        for row in range(start, end):
            own = block[row - start]
            rounded = search_groups(own.view(groups, format.group), outputs, format, shrinks, symmetric=symmetric)
            codes[row], scales[row], zero_points[row] = rounded
            decoded = (rounded[0] - rounded[2][:, None]) * rounded[1][:, None]
            error = (own - decoded.flatten()) / diagonal[row]
            block[row - start + 1 :].addr_(rows.factor[row, row + 1 : end], error, alpha=-1)
            errors[row - start] = error
        left[end:].addmm_(rows.factor[start:end, end:].T, errors, alpha=-1)
    back = rows.order.argsort()
    return Codes(
        format,
        _array(codes[back].flatten(1)[:, :outputs]),
        _array(scales[back]),
        _array(zero_points[back]),
    )


def search_groups(
    grouped: torch.Tensor, columns: int, format: IntegerFormat, shrinks: torch.Tensor, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round groups to the nearest codes with the range that costs least: `integers.round_to_nearest` in PyTorch.

    Args:
        grouped: float32 [groups, group], a row.
        columns: Elements of the row; what follows fills the last group, and its errors do not count.
        format: Of the codes.
        shrinks: Ranges to try, as parts of a group's own, float32 [n, 1].
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
    squares = ((codes - zero_points[..., None]) * scales[..., None] - grouped).square()
    squares.flatten(1)[:, columns:] = 0
    best = squares.sum(dim=2).argmin(dim=0)  # [groups]
    groups = torch.arange(len(grouped), device=grouped.device)
    return codes[best, groups], scales[best, groups], zero_points[best, groups]


def _array(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.cpu().numpy())
