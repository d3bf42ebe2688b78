"""Artifacts of random weights, built for one measurement and deleted after it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tda_export.calibration.budgets import Budget
from tda_export.graph import kv_formats
from tda_export.graph.export import BuildRequest, export_artifact
from tda_export.graph.indexed import IndexedDesign
from tda_export.graph.method import tda
from tda_export.graph.priced import PricedDesign
from tda_export.graph.requests import default_packing
from tda_export.graph.storage import Storage
from tda_export.models.source import ModelSource
from tda_export.packing import Packing, linear_outputs, linear_shape, packed_matrices
from tda_export.runtime.artifact import Artifact, open_artifact


def build_random_artifact(source: ModelSource, folder: Path, dtype: str, sparsity: float, *, quiet: bool) -> Artifact:
    """Build a two-level TDA artifact with tail mean; the measurement chooses its own thresholds.

    Args:
        source: A model with random weights.
        folder: The artifact to create.
        dtype: A value of `contract.DTYPES`.
        sparsity: Recorded in the manifest only.
        quiet: Show no progress.
    """
    spec = source.spec
    # Up rows of random weights have length 1, so their products with a normalised x have a root mean square of 1.
    up_rms = torch.ones(spec.num_layers, spec.ffn_size)
    method, thresholds = tda("mean", two_levels=True), [0.0] * spec.num_layers
    budget = Budget(sparsity=sparsity, allocation="uniform")
    design = IndexedDesign(method, thresholds, up_rms=up_rms)
    request = BuildRequest(source, Storage(dtype), design, budget.describe())
    export_artifact(request, folder, quiet=quiet, check=lambda folder: None)
    return open_artifact(folder)


# Shares of rows read at half of the bytes, as measured on a real model of half a billion weights.
DENSITIES = {"q": 0.42, "k": 0.63, "v": 0.76, "o": 0.64, "gate": 0.49, "up": 0.59, "down": 0.39}
WORTH = (1e15, 0.0)  # worth of a row: read at all prices except the highest, or at none
PRICES = (1e-3, 1e30)  # prices of the lower and of the higher sparsity


def scaled(unread: Mapping[str, float], size: Mapping[str, int], sparsity: float) -> dict[str, float]:
    """Scale the unread share of each matrix so that `sparsity` of all bytes is unread: towards 0 or, where more must be
    unread, towards 1.

    Args:
        unread: The unread share of each matrix, in (0, 1).
        size: The size of each matrix, in any unit.
        sparsity: In [0, 1].
    """
    mean = sum(share * size[name] for name, share in unread.items()) / sum(size.values())
    if sparsity <= mean:
        return {name: share * sparsity / mean for name, share in unread.items()}
    return {name: 1 - (1 - share) * (1 - sparsity) / (1 - mean) for name, share in unread.items()}


def build_random_priced(
    source: ModelSource,
    folder: Path,
    storage: Storage,
    sparsities: Sequence[float],
    *,
    packing: Packing | None = None,
    kv: str = kv_formats.KV_FLOAT,
    seed: int = 0,
    quiet: bool,
) -> tuple[Artifact, dict[float, float]]:
    """Build a priced artifact of random weights in which two prices read two given shares of the bytes, exact to one
    row.

    Rows are drawn independently of each other and of x, so a price reads the same rows for every token. A matrix's
    share follows `DENSITIES`.

    Args:
        source: A model with random weights.
        folder: The artifact to create.
        storage: How its weights are stored.
        sparsities: One sparsity, or a lower and a higher one: shares of the linears' bytes that are not read.
        packing: The packing of the linears; None chooses by storage.
        kv: How keys and values are stored, one of `kv_formats.KV_FORMATS`.
        seed: The seed of the draw.
        quiet: Show no progress.

    Returns:
        The artifact, and the price of each sparsity.
    """
    spec, chosen = source.spec, packing or default_packing(source.spec, storage)
    generator = torch.Generator().manual_seed(seed)
    matrices = packed_matrices(spec, chosen)
    inputs = {name: linear_shape(spec, parts[0])[0] for name, parts in matrices.items()}
    row_bytes, outputs = storage.row_bytes(spec), linear_outputs(spec)
    size = {
        name: inputs[name] * sum(row_bytes.of(layer, parts, outputs) for layer in range(spec.num_layers))
        for name, parts in matrices.items()
    }
    unread = {
        name: 1 - sum(DENSITIES[part] * outputs[part] for part in parts) / sum(outputs[part] for part in parts)
        for name, parts in matrices.items()
    }
    levels = WORTH[-len(sparsities) :]
    prices = {}
    for name in matrices:
        order = torch.rand(spec.num_layers, inputs[name], generator=generator).argsort(dim=1).argsort(dim=1)
        worth = torch.full(order.shape, math.inf)
        for sparsity, level in zip(sorted(sparsities, reverse=True), levels, strict=True):
            worth[order < scaled(unread, size, sparsity)[name] * inputs[name]] = level
        prices[name] = worth
    design = PricedDesign(chosen, prices, 0.0)
    request = BuildRequest(source, storage, design, {"price": 0.0}, kv=kv)
    export_artifact(request, folder, quiet=quiet, check=lambda folder: None)
    return open_artifact(folder), dict(zip(sorted(sparsities), PRICES, strict=False))
