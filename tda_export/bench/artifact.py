"""Artifacts of random weights, built for one measurement and thrown away after it."""

from __future__ import annotations

from pathlib import Path

import torch

from tda_export.calibration.budgets import Budget
from tda_export.graph.export import BuildRequest, export_artifact
from tda_export.graph.indexed import IndexedDesign
from tda_export.graph.method import tda
from tda_export.models.source import ModelSource
from tda_export.runtime.artifact import Artifact, open_artifact


def build_random_artifact(source: ModelSource, folder: Path, dtype: str, sparsity: float, *, quiet: bool) -> Artifact:
    """Build a two-level TDA artifact with tail mean; thresholds are the measurement's own business.

    Args:
        source: A model with random weights.
        folder: The artifact to create.
        dtype: A value of `contract.DTYPES`.
        sparsity: For the record.
        quiet: No progress.
    """
    spec = source.spec
    # Up rows of random weights have length 1, so their products with a normalised x have a root mean square of 1.
    up_rms = torch.ones(spec.num_layers, spec.ffn_size)
    method, thresholds = tda("mean", two_levels=True), [0.0] * spec.num_layers
    budget = Budget(sparsity=sparsity, allocation="uniform")
    design = IndexedDesign(method, thresholds, up_rms=up_rms)
    request = BuildRequest(source, dtype, design, budget.describe())
    export_artifact(request, folder, quiet=quiet, check=lambda folder: None)
    return open_artifact(folder)
