"""Every family against transformers: prefill, decode, masks, chunks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tda_export.calibration.budgets import Budget
from tda_export.graph.export import BuildRequest, export_artifact
from tda_export.graph.indexed import IndexedDesign
from tda_export.graph.method import Method, griffin, tda
from tda_export.graph.verify import verify_artifact
from tda_export.models.source import ModelSource, resolve_model
from tests.tiny import FAMILIES, save_tiny_model

THRESHOLD = 0.08  # about half of 96 neurons score more than this


def build_tiny(source: ModelSource, output: Path, *, method: Method | None = None, dtype: str = "float32") -> Path:
    method = method or tda("mean", two_levels=True)
    spec = source.spec
    up_rms = torch.ones(spec.num_layers, spec.ffn_size) if method.two_levels else None
    design = IndexedDesign(method, [THRESHOLD] * spec.num_layers, up_rms=up_rms)
    request = BuildRequest(source, dtype, design, Budget(sparsity=0.5).describe())
    export_artifact(request, output, quiet=True, check=lambda folder: None)
    return output


@pytest.mark.parametrize("family", FAMILIES)
def test_family_matches_transformers(family: str, tmp_path: Path) -> None:
    source = resolve_model(str(save_tiny_model(family, tmp_path / "model")))
    artifact = build_tiny(source, tmp_path / "artifact")
    checks = verify_artifact(artifact, lambda name: source, provider="cpu", quiet=True)
    assert len(checks) == 15
    assert [check for check in checks if not check.passed] == []


@pytest.mark.parametrize("method", [tda("zero"), tda("mean"), griffin(0.5)], ids=["tda-zero", "tda-mean", "griffin"])
def test_method_matches_transformers(method: Method, tiny_model: Path, tmp_path: Path) -> None:
    source = resolve_model(str(tiny_model))
    artifact = build_tiny(source, tmp_path / "artifact", method=method)
    checks = verify_artifact(artifact, lambda name: source, provider="cpu", quiet=True)
    assert [check for check in checks if not check.passed] == []


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "opt-post-norm", "gpt-neox", "phi4-mini"])
def test_float16_on_the_cpu(family: str, tmp_path: Path) -> None:
    source = resolve_model(str(save_tiny_model(family, tmp_path / "model")))
    artifact = build_tiny(source, tmp_path / "artifact", dtype="float16")
    checks = verify_artifact(artifact, lambda name: source, provider="cpu", quiet=True)
    assert [check for check in checks if not check.passed] == []
