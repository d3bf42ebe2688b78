"""Magnitudes of the inputs of linears: histograms that give a threshold for any density.

TEAL (arXiv 2408.14690) reads row i where |x_i| reaches a threshold of the matrix, WINA (arXiv 2505.19427) where
|x_i| ||W_i|| does, W_i the weights of input channel i. Both equal priced rows at price 1 with other row prices: 1 / θ²
and ||W_i||² / θ².
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tda_export.calibration.prices import priced_matrices
from tda_export.models.linear_modules import layer_linears
from tda_export.models.spec import DecoderSpec
from tda_export.packing import Packing, linear_shape, linear_sites, packed_matrices

# A float32's exponent and the first bits of its mantissa select its bin: 32 bins an octave, from 2^-24 to 2^16.
MANTISSA_BITS = 5
_SHIFT = 23 - MANTISSA_BITS
_FIRST, _END = (127 - 24) << MANTISSA_BITS, (127 + 16) << MANTISSA_BITS
BINS = 1 + _END - _FIRST  # bin 0 holds zero and all smaller values
ALL_BINS = 256 << MANTISSA_BITS  # bins of all non-negative float32 values


def float_bins(x: torch.Tensor) -> torch.Tensor:
    """Return the bins of non-negative float32 values, int64 in [0, ALL_BINS), monotone in x."""
    return x.view(torch.int32).bitwise_right_shift(_SHIFT).long()


def bin_edges() -> torch.Tensor:
    """Return the smallest value of every bin and the end of the last, float32 [ALL_BINS / 2 + 1] up to infinity."""
    return (torch.arange((255 << MANTISSA_BITS) + 1, dtype=torch.int32) << _SHIFT).view(torch.float32)


def magnitude_edges() -> torch.Tensor:
    """Return the smallest magnitude of each bin of a histogram and the end of the last, float64 [BINS + 1]."""
    return torch.cat([torch.zeros(1), bin_edges()[_FIRST : _END + 1]]).double()


def count_magnitudes(x: torch.Tensor) -> torch.Tensor:
    """Count |x| by bin, int64 [BINS]; the last bin also counts larger values."""
    bins = (float_bins(x.float().abs()) - _FIRST + 1).clamp(0, BINS - 1)
    return torch.bincount(bins.flatten(), minlength=BINS)


@dataclass(frozen=True)
class Magnitudes:
    """Histograms over the tokens of continuations, int64 [L, BINS] on the CPU; histograms of two halves add up.

    `inputs`: |x_i|, by site. `weighted`: |x_i| ||W_i||, by matrix (a part, or a site of several).
    """

    inputs: dict[str, torch.Tensor]
    weighted: dict[str, torch.Tensor]

    def __add__(self, other: Magnitudes) -> Magnitudes:
        return Magnitudes(_sum(self.inputs, other.inputs), _sum(self.weighted, other.weighted))


def no_magnitudes(spec: DecoderSpec) -> Magnitudes:
    """Return empty histograms."""

    def zeros(names: Any) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(spec.num_layers, BINS, dtype=torch.int64) for name in names}

    return Magnitudes(zeros(linear_sites(spec)), zeros(priced_matrices(spec)))


def thresholds_at(histogram: torch.Tensor, density: torch.Tensor) -> torch.Tensor:
    """Return the thresholds that a given share of the inputs reaches.

    Values are taken as evenly spread within a bin.

    Args:
        histogram: The histogram of magnitudes, int64 [L, BINS].
        density: The share for each layer, float [L].

    Returns:
        float64 [L]; 0 where all rows are to be read.
    """
    edges = magnitude_edges()
    reach = histogram.flip(1).cumsum(1).flip(1).double()  # [L, BINS], how many are in this bin or above
    wanted = density.double().clamp(0, 1) * reach[:, 0]
    # The highest bin whose lower edge enough values reach.
    chosen = (reach >= wanted[:, None]).sum(1) - 1  # [L]
    rows = torch.arange(len(histogram))
    inside = (reach[rows, chosen] - wanted) / histogram[rows, chosen].clamp_min(1)  # of the bin, from below
    thresholds = edges[chosen] + inside.clamp(0, 1) * (edges[chosen + 1] - edges[chosen])
    return torch.where(density >= 1, 0.0, thresholds)


def teal_row_prices(
    magnitudes: Magnitudes, spec: DecoderSpec, packing: Packing, densities: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the row prices with which a price of 1 is TEAL: 1 / θ², float32 [L, in] of each matrix.

    Args:
        magnitudes: The magnitudes from calibration.
        spec: The model's architecture.
        packing: The packing, which determines the matrices.
        densities: The fraction of rows for a token to read, by matrix, float [L].
    """
    prices = {}
    for name, parts in packed_matrices(spec, packing).items():
        site = next(site for site, members in linear_sites(spec).items() if set(parts) <= set(members))
        thresholds = thresholds_at(magnitudes.inputs[site], densities[name])  # [L]
        inputs = linear_shape(spec, parts[0])[0]
        prices[name] = thresholds.square().reciprocal().float()[:, None].repeat(1, inputs)
    return prices


def wina_row_prices(
    magnitudes: Magnitudes,
    norms: Mapping[str, torch.Tensor],
    spec: DecoderSpec,
    packing: Packing,
    densities: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Return the row prices with which a price of 1 is WINA by thresholds: ||W_i||² / θ², as `teal_row_prices`.

    Args:
        magnitudes: The magnitudes from calibration.
        norms: ||W_i|| by matrix, float32 [L, in].
        spec: The model's architecture.
        packing: The packing, which determines the matrices.
        densities: The fraction of rows for a token to read, by matrix, float [L].
    """
    prices = {}
    for name in packed_matrices(spec, packing):
        thresholds = thresholds_at(magnitudes.weighted[name], densities[name])  # [L]
        # A row of zero weights is worth nothing, even where all other rows are read.
        worth = norms[name].double().cpu().square() / thresholds.square()[:, None]
        prices[name] = worth.nan_to_num(nan=0.0, posinf=torch.inf).float()
    return prices


def row_norms(model: Any, spec: DecoderSpec) -> dict[str, torch.Tensor]:
    """Compute ||W_i||, the norm of the weights of input channel i: float32 [L, in] of each matrix."""
    norms: dict[str, list[torch.Tensor]] = {}
    for layer in range(spec.num_layers):
        squares = {
            part: linear.weight.float().square().sum(dim=1)
            for part, linear in layer_linears(model, spec, layer).items()
        }
        for name, parts in priced_matrices(spec).items():
            together = torch.stack([squares[part] for part in parts]).sum(dim=0)
            norms.setdefault(name, []).append(together.sqrt().to(model.device))
    return {name: torch.stack(layers) for name, layers in norms.items()}


class MagnitudeCounter:
    """Counts the magnitudes of sites' inputs while a model runs; pass `observe` to `watch_sites`."""

    def __init__(self, spec: DecoderSpec, norms: dict[str, torch.Tensor]) -> None:
        self._norms = norms
        self._by_site = {
            site: [name for name, members in priced_matrices(spec).items() if set(members) <= set(parts)]
            for site, parts in linear_sites(spec).items()
        }
        self.counts = no_magnitudes(spec)

    def observe(self, layer: int, site: str, x: torch.Tensor) -> None:
        """Add the input of a site, [T, in]."""
        size = x.detach().float().abs()
        self.counts.inputs[site][layer] += count_magnitudes(size).cpu()
        for name in self._by_site[site]:
            self.counts.weighted[name][layer] += count_magnitudes(size * self._norms[name][layer].to(x.device)).cpu()


def _sum(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value + others[name] for name, value in some.items()}
