"""Other methods of a priced artifact: the same graph with other prices of rows.

TEAL (arXiv 2408.14690) reads row i of a matrix where |x_i| reaches a threshold θ, WINA (arXiv 2505.19427) where
|x_i| ||W_i|| does, W_i the weights of input channel i. At price 1 that is the row price 1 / θ² and ||W_i||² / θ².
WINA's paper takes the largest inputs of each token; here a threshold is used, as in TEAL. Thresholds are quantiles over
the tokens of the calibration text, for each matrix separately. Rows that may not be dropped have an infinite row price.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch

from tda_export.calibration.magnitudes import thresholds_at
from tda_export.calibration.price_file import Priced
from tda_export.graph import contract
from tda_export.models.spec import DecoderSpec
from tda_export.packing import Packing, Parts, droppable_matrices, linear_shape, linear_sites, packed_matrices
from tda_export.weights.plan import HEAD

ThresholdMethod = Literal["teal", "wina"]
Densities = Mapping[str, torch.Tensor]  # share of rows that a token reads, [L], by matrix
ALWAYS = math.inf  # the price of a row that every token reads


def uniform_densities(spec: DecoderSpec, packing: Packing, parts: Parts, sparsity: float) -> dict[str, torch.Tensor]:
    """Return the same density for every matrix whose rows may be dropped: 1 - `sparsity` of its rows, and so of its
    bytes.

    The sparsity is a share in [0, 1).
    """
    density = torch.full((spec.num_layers,), 1.0 - sparsity, dtype=torch.float64)
    return dict.fromkeys(droppable_matrices(spec, packing, parts), density)


def threshold_prices(
    method: ThresholdMethod, priced: Priced, spec: DecoderSpec, packing: Packing, densities: Densities
) -> dict[str, torch.Tensor]:
    """Return the row prices of a method whose price is 1.

    Args:
        method: `teal` or `wina`.
        priced: The magnitudes and norms of rows from calibration.
        spec: The architecture.
        packing: The packing of the matrices.
        densities: The density of each matrix that may drop rows.

    Returns:
        float32 [L, in] of each of these matrices; infinite in a layer that reads all rows.
    """
    sites = {part: site for site, parts in linear_sites(spec).items() for part in parts}
    prices = {}
    for name, density in densities.items():
        parts = packed_matrices(spec, packing)[name]
        if method == "teal":
            counts = priced.magnitudes.inputs[sites[parts[0]]]
            worth = torch.ones(spec.num_layers, linear_shape(spec, parts[0])[0], dtype=torch.float64)
        else:
            counts = priced.magnitudes.weighted[name]
            worth = priced.norms[name].double().square()
        threshold = thresholds_at(counts, density)[:, None]  # [L, 1]
        prices[name] = torch.where(threshold > 0, worth / threshold.square(), ALWAYS).float()
    return prices


def always_read(spec: DecoderSpec, packing: Packing, parts: Parts, *, head: bool) -> dict[str, torch.Tensor]:
    """Return the (infinite) row prices of the matrices that may not skip rows: float32 [L, in], [1, in] of the head.

    `head` says whether the head's rows have prices in the artifact.
    """
    dropped = droppable_matrices(spec, packing, parts)
    of_head = {HEAD: torch.full((1, linear_shape(spec, HEAD)[0]), ALWAYS)} if head and parts != "all" else {}
    return of_head | {
        name: torch.full((spec.num_layers, linear_shape(spec, members[0])[0]), ALWAYS)
        for name, members in packed_matrices(spec, packing).items()
        if name not in dropped
    }


def by_layer(prices: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Return row prices [L, in] by stored matrix as float32 [in] by the matrix's name in the graphs."""
    return {
        matrix: row.numpy()
        for name, rows in prices.items()
        for matrix, row in zip(contract.weights_of(name, len(rows)), rows, strict=True)
    }
