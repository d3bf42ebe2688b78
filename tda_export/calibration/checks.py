"""Check the tensors of a calibration file, so that later code does not compute with impossible numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tda_export.calibration.curves import CurveSums
from tda_export.calibration.kl_table import COLUMNS, KlTable
from tda_export.errors import shown

ROUNDING = 1e-3  # relative: how far sums of shares may exceed the whole
NEGATIVE_KL = -1e-2  # nats per token: how far rounding may take a KL of zero below zero
LARGEST = 1e30  # of means, whose squares and products must stay finite in float32
MOST_PRIOR_TOKENS = 1e9

Bounds = tuple[float, float]
SHARE = (0.0, 1.0 + ROUNDING)
NOT_NEGATIVE = (0.0, LARGEST)
# A layer's mean over the items that its sums count.
MEANS: dict[str, Bounds] = {
    "ratio": NOT_NEGATIVE,
    "density": SHARE,
    "token_density": SHARE,
    "score_square": SHARE,
    "activation": (-LARGEST, LARGEST),
    "up_square": NOT_NEGATIVE,
}
PATH: dict[str, Bounds] = {
    "share": SHARE,
    "kl": (NEGATIVE_KL, LARGEST),
    "kl_stderr": NOT_NEGATIVE,
    "thresholds": NOT_NEGATIVE,
    "token_thresholds": NOT_NEGATIVE,
    "mask_density": SHARE,
    "token_density": SHARE,
    "cett": NOT_NEGATIVE,
    "sensitivity": (NEGATIVE_KL, LARGEST),
}


class Sizes(NamedTuple):
    """L layers, K thresholds, F neurons."""

    layers: int
    points: int
    neurons: int


def check_curves(grid: torch.Tensor, sums: CurveSums) -> Sizes:
    """Check thresholds and sums, and return their sizes.

    Raises:
        ValueError: A tensor has the wrong dtype or shape, or holds impossible values: not finite, negative shares,
            shares above the whole, thresholds or densities out of order. The message names the tensor.
    """
    _shape("grid", grid, torch.float32, (None,))
    _shape("score_square", sums.score_square, torch.float64, (None, None))
    sizes = Sizes(sums.score_square.shape[0], grid.shape[0], sums.score_square.shape[1])
    layers, points, neurons = sizes
    for name in ("ratio", "density", "token_density"):
        tensor = getattr(sums, name)
        of_prompts = name == "token_density" and tuple(tensor.shape) == (layers, 0)
        _shape(name, tensor, torch.float64, (layers, 0 if of_prompts else points))
    for name in ("activation", "up_square"):
        _shape(name, getattr(sums, name), torch.float64, (layers, neurons))
    # A layer may have no token with a nonzero FFN output.
    for name, size, least in (("ratio_tokens", layers, 0.0), ("sequences", 1, 1.0), ("tokens", 1, 1.0)):
        _shape(name, getattr(sums, name), torch.float64, (size,))
        _within(name, getattr(sums, name), (least, LARGEST))
    _within("grid", grid, NOT_NEGATIVE)
    _require("grid", bool(grid[0] == 0) and bool((grid.diff() > 0).all()), "does not rise from 0")
    counts = {"ratio": sums.ratio_tokens[:, None].clamp_min(1), "density": sums.sequences}
    for name, bounds in MEANS.items():
        _within(name, getattr(sums, name) / counts.get(name, sums.tokens), bounds)
    for name in ("density", "token_density"):
        _require(name, bool((getattr(sums, name).diff(dim=1) <= ROUNDING).all()), "rises with the threshold")
    # The relative magnitudes of a token form a vector of length 1.
    _within("score_square", (sums.score_square / sums.tokens).sum(dim=1), SHARE)
    return sizes


def check_path(table: KlTable, layers: int) -> None:
    """Check a KL path of `layers` layers.

    Raises:
        ValueError: As `check_curves`, or settings are not ordered from dense to sparse.
    """
    _shape("share", table.share, torch.float32, (None,))
    settings = len(table.share)
    for name in COLUMNS[1:]:
        columns = 2 if name in ("kl", "kl_stderr") else layers
        _shape(name, getattr(table, name), torch.float32, (settings, columns))
    for name, bounds in PATH.items():
        _within(name, getattr(table, name), bounds)
    _require("share", bool((table.share > 0).all()) and bool((table.share.diff() < 0).all()), "does not fall")
    more = table.token_density - table.mask_density
    _require("token_density", bool((more <= ROUNDING).all()), "is more than mask_density")
    _shape("prior_tokens", table.prior_tokens, torch.float32, (1,))
    _within("prior_tokens", table.prior_tokens, (0.0, MOST_PRIOR_TOKENS))


def _require(name: str, condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(f"{name} {problem}")


def _shape(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    """Check dtype and shape; a size of None is any size except 0."""
    found = tuple(tensor.shape)
    fits = len(found) == len(shape) and all(
        one > 0 if other is None else one == other for one, other in zip(found, shape, strict=True)
    )
    if tensor.dtype != dtype or not fits:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        kind, other = (str(value).removeprefix("torch.") for value in (dtype, tensor.dtype))
        raise ValueError(f"{name} should be {kind} [{expected}], and is {other} {shown(list(found))}")


def _within(name: str, values: torch.Tensor, bounds: Bounds) -> None:
    if not values.numel():
        return
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} has values that are not finite")
    low, high = bounds
    smallest, largest = float(values.min()), float(values.max())
    if smallest < low:
        raise ValueError(f"{name} is {smallest:.4g}, and at least {low:.4g} is possible")
    if largest > high:
        raise ValueError(f"{name} is {largest:.4g}, and at most {high:.4g} is possible")
