"""Which graphs read prompts by `tda::Attention`, and which by ONNX Runtime's operator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tda_export.graph import contract, operators
from tda_export.models.source import ModelSource
from tda_export.runtime.artifact import open_artifact
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.priced import PricedPrefill
from tda_export.runtime.session import Sessions
from tests.graph.test_fused import build, source_of  # noqa: F401
from tests.runtime.conftest import without_native_kernels


def attention(artifact: Path) -> Counter[tuple[str, str]]:
    model = ir.load(artifact / contract.PREFILL_FILE)
    return Counter((node.domain, node.op_type) for node in model.graph if "Attention" in node.op_type)


OWN, STOCK = (operators.FUNCTION_DOMAIN, operators.ATTENTION), ("com.microsoft", "GroupQueryAttention")


def test_prices_in_float32(priced_artifact: Path) -> None:
    assert attention(priced_artifact) == {OWN: open_artifact(priced_artifact).shape.num_layers}


def test_prompt_masks(tiny_artifact: Path) -> None:
    assert attention(tiny_artifact) == {STOCK: open_artifact(tiny_artifact).shape.num_layers}


def test_half_precision(source_of: Callable[[str], ModelSource], tmp_path: Path) -> None:  # noqa: F811
    source = source_of("llama")
    assert attention(build(source, tmp_path / "artifact", "sites", "int4")) == {STOCK: source.spec.num_layers}


@pytest.mark.parametrize("pieces", [[300], [40, 257, 3]], ids=str)
def test_a_long_prompt(priced_artifact: Path, pieces: list[int]) -> None:
    """The kernel and the operator agree on logits and on what is in the cache."""
    artifact = open_artifact(priced_artifact)
    tokens = np.random.default_rng(0).integers(0, artifact.shape.vocab_size, sum(pieces)).tolist()
    found = []
    for native in (True, False):
        if native:
            sessions = Sessions(artifact, "cpu")
        else:
            with without_native_kernels():
                sessions = Sessions(artifact, "cpu")
        assert sessions.native == native
        cache = KvCache(artifact.shape, "cpu", len(tokens))
        prefill = PricedPrefill(sessions, artifact.shape, cache)
        start = 0
        for piece in pieces:
            logits = prefill.read(tokens[start : start + piece])
            start += piece
        layers = range(artifact.shape.num_layers)
        found.append([logits.copy(), *(part.numpy() for layer in layers for part in cache.keys_and_values(layer))])
    for result, expected in zip(*found, strict=True):
        np.testing.assert_allclose(result, expected, rtol=0, atol=2e-5 * max(1.0, float(np.abs(expected).max())))
