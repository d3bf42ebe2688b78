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
from tda_export.models.spec import DecoderSpec
from tda_export.packing import HeadRows, Packing, linear_outputs, linear_shape, packed_matrices
from tda_export.runtime.artifact import Artifact, open_artifact
from tda_export.weights.plan import HEAD


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
# The head's share there, as measured on SmolLM2-135M (benchmarks/head_rows.py): where its elements are as wide as those
# of the layers' linears, and where they are twice as wide.
HEAD_DENSITIES = {1: 0.61, 2: 0.49}
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


def _head_density(spec: DecoderSpec, storage: Storage) -> float:
    """Return the share of the head's rows that is read at half of the linears' bytes."""
    row_bytes, outputs = storage.row_bytes(spec, head=True), linear_outputs(spec)
    head, down = (row_bytes.of(0, (part,), outputs) / outputs[part] for part in (HEAD, "down"))
    return HEAD_DENSITIES[min(HEAD_DENSITIES, key=lambda times: abs(times - head / down))]


def build_random_priced(
    source: ModelSource,
    folder: Path,
    storage: Storage,
    sparsities: Sequence[float],
    *,
    packing: Packing | None = None,
    kv: str = kv_formats.KV_FLOAT,
    head: HeadRows = "priced",
    seed: int = 0,
    quiet: bool,
) -> tuple[Artifact, dict[float, float]]:
    """Build a priced artifact of random weights in which two prices read two given shares of the bytes, exact to one
    row.

    Rows are drawn independently of each other and of x, so a price reads the same rows for every token. A matrix's
    share follows `DENSITIES`, the head's `HEAD_DENSITIES`.

    Args:
        source: A model with random weights.
        folder: The artifact to create.
        storage: How its weights are stored.
        sparsities: One sparsity, or a lower and a higher one: shares of the linears' bytes that are not read.
        packing: The packing of the linears; None chooses by storage.
        kv: How keys and values are stored, one of `kv_formats.KV_FORMATS`.
        head: Whether rows of the head have prices too. The head's bytes do not count in the sparsities.
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
    layers = dict.fromkeys(matrices, spec.num_layers)
    if head == "priced":
        layers[HEAD], inputs[HEAD], size[HEAD] = 1, linear_shape(spec, HEAD)[0], 0
        unread[HEAD] = 1 - _head_density(spec, storage)
    levels = WORTH[-len(sparsities) :]
    prices = {}
    for name, count in layers.items():
        order = torch.rand(count, inputs[name], generator=generator).argsort(dim=1).argsort(dim=1)
        worth = torch.full(order.shape, math.inf)
        for sparsity, level in zip(sorted(sparsities, reverse=True), levels, strict=True):
            worth[order < scaled(unread, size, sparsity)[name] * inputs[name]] = level
        prices[name] = worth
    design = PricedDesign(chosen, prices, 0.0)
    request = BuildRequest(source, storage, design, {"price": 0.0}, kv=kv)
    export_artifact(request, folder, quiet=quiet, check=lambda folder: None)
    return open_artifact(folder), dict(zip(sorted(sparsities), PRICES, strict=False))
