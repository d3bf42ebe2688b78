"""float16 on CUDA: every family against transformers, and the driver's device paths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tda_export.graph.verify import verify_artifact
from tda_export.models.source import resolve_model
from tda_export.runtime import load
from tests.graph.test_ffn import session
from tests.graph.test_parity import build_tiny
from tests.tiny import FAMILIES, save_tiny_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", FAMILIES)
def test_family_matches_transformers_in_float16(family: str, tmp_path: Path) -> None:
    source = resolve_model(str(save_tiny_model(family, tmp_path / "model")))
    artifact = build_tiny(source, tmp_path / "artifact", dtype="float16")
    checks = verify_artifact(artifact, lambda name: source, provider="cuda", quiet=True)
    assert len(checks) == 12
    assert [check for check in checks if not check.passed] == []


@pytest.mark.parametrize("mask", ["tda", "dense"])
def test_growing_cache_changes_nothing(
    mask: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = build_tiny(resolve_model(str(tiny_model)), tmp_path / "artifact", dtype="float16")
    model = load(artifact)
    assert model.provider == "cuda"
    prompt = list(range(3, 53))
    whole = [token.id for token in model.generate(prompt, mask=mask, max_new_tokens=100)]  # type: ignore[arg-type]
    monkeypatch.setattr("tda_export.runtime.kv_cache.FIRST_CAPACITY", 16)
    grown = [token.id for token in model.generate(prompt, mask=mask, max_new_tokens=100)]  # type: ignore[arg-type]
    assert grown == whole


def test_indices_that_are_no_neurons_are_ignored() -> None:
    rng = np.random.default_rng(0)
    x, (gate, up, down) = rng.standard_normal((1, 1, 16)), rng.standard_normal((3, 8, 16))
    feeds = {
        name: value.astype(np.float16) for name, value in (("x", x), ("w_gate", gate), ("w_up", up), ("w_down", down))
    }
    call = session(biases=False, element=ir.DataType.FLOAT16, providers=["CUDAExecutionProvider"])
    (expected,) = call.run(None, feeds | {"mask_indices": np.array([0, 5], np.int32)})
    (y,) = call.run(None, feeds | {"mask_indices": np.array([0, -7, 8, 5, -1, 2**30], np.int32)})
    np.testing.assert_allclose(y, expected, rtol=1e-2, atol=1e-3)


def test_both_sessions_use_the_same_weights(tiny_model: Path, tmp_path: Path) -> None:
    model = load(build_tiny(resolve_model(str(tiny_model)), tmp_path / "artifact", dtype="float16"), provider="cuda")
    shared = set(model.artifact.manifest["weights"])
    used = model.artifact.manifest["graph_weights"]
    assert all(set(names) <= shared for names in used.values())
    assert set(model.sessions.shared_weights) == shared
