"""Priced artifacts of every family against transformers with the same rows skipped."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tda_export.graph import kv_formats
from tda_export.graph.export import BuildRequest, export_artifact
from tda_export.graph.priced import PricedDesign
from tda_export.graph.priced_parity import PricedComparison
from tda_export.graph.storage import Storage
from tda_export.graph.verify import verify_artifact
from tda_export.models.source import ModelSource, resolve_model
from tda_export.packing import PACKINGS, Packing, linear_shape, packed_matrices
from tda_export.runtime.artifact import open_artifact
from tda_export.runtime.session import map_weight
from tda_export.weights.plan import HEAD
from tests.tiny import FAMILIES, save_tiny_model


def random_prices(
    source: ModelSource, packing: Packing, seed: int = 0, *, head: bool = True
) -> dict[str, torch.Tensor]:
    """Return row prices that differ a little, so that x also decides which rows are read."""
    generator, spec = torch.Generator().manual_seed(seed), source.spec
    prices = {
        name: torch.rand(spec.num_layers, linear_shape(spec, parts[0])[0], generator=generator) + 0.5
        for name, parts in packed_matrices(spec, packing).items()
    }
    return prices | ({HEAD: torch.rand(1, linear_shape(spec, HEAD)[0], generator=generator) + 0.5} if head else {})


def build_priced(
    source: ModelSource,
    output: Path,
    packing: Packing,
    *,
    dtype: str = "float32",
    kv: str = kv_formats.KV_FLOAT,
    head: bool = True,
) -> Path:
    design = PricedDesign(packing, random_prices(source, packing, head=head), 0.0)
    request = BuildRequest(source, Storage(dtype), design, {"price": 0.0}, kv=kv)
    export_artifact(request, output, quiet=True, check=lambda folder: None)
    return output


@pytest.fixture(scope="session")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelSource]:
    """Return the tiny model of a family. It is loaded once, so that checks share the transformers module."""

    @functools.cache
    def load(family: str) -> ModelSource:
        source = resolve_model(str(save_tiny_model(family, tmp_path_factory.mktemp("priced") / family)))
        object.__setattr__(source, "reference", functools.cache(source.reference))  # the dataclass is frozen
        return source

    return load


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_family_matches_transformers(
    family: str, packing: Packing, source_of: Callable[[str], ModelSource], tmp_path: Path
) -> None:
    source = source_of(family)
    artifact = build_priced(source, tmp_path / "artifact", packing)
    checks = verify_artifact(artifact, lambda name: source, provider="cpu", quiet=True)
    assert len(checks) == 11
    assert [check for check in checks if not check.passed] == []


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2", "opt-post-norm"])
def test_a_head_that_is_read_whole(family: str, source_of: Callable[[str], ModelSource], tmp_path: Path) -> None:
    """A tied one is stored once."""
    source = source_of(family)
    artifact = build_priced(source, tmp_path / "artifact", "sites", head=False)
    opened = open_artifact(artifact)
    assert not opened.prices_head
    assert (HEAD in opened.matrices) == (not source.spec.tied_head)
    checks = verify_artifact(artifact, lambda name: source, provider="cpu", quiet=True)
    assert [check for check in checks if not check.passed] == []


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_a_head_with_prices_lies_by_input(family: str, source_of: Callable[[str], ModelSource], tmp_path: Path) -> None:
    source = source_of(family)
    artifact = open_artifact(build_priced(source, tmp_path / "artifact", "sites"))
    spec = source.spec
    assert artifact.prices_head
    assert (artifact.head.major, artifact.head.shape) == ("input", (spec.hidden_size, spec.vocab_size))
    head = torch.from_numpy(map_weight(artifact, HEAD))
    weight = source.reference().get_output_embeddings().weight.detach()
    assert torch.equal(head, weight.T)


@pytest.mark.parametrize("matrix", ["q", "v", "o", "gate", "down", "head"])
def test_a_matrix_of_other_prices_is_found(
    matrix: str, source_of: Callable[[str], ModelSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of("llama")
    artifact = build_priced(source, tmp_path / "artifact", "separate")
    own = PricedComparison._row_prices

    def other(comparison: PricedComparison) -> dict[str, torch.Tensor]:
        prices = own(comparison)
        return prices | {matrix: 2 * prices[matrix]}

    monkeypatch.setattr(PricedComparison, "_row_prices", other)
    checks = verify_artifact(artifact, lambda name: source, provider="cpu", quiet=True)
    assert {check.name for check in checks if not check.passed} == {"rows read at a price"}


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "opt-post-norm", "gpt-neox", "phi4-mini"])
@pytest.mark.parametrize("kv", [kv_formats.KV_FLOAT, kv_formats.KV_INT8])
def test_float16_on_the_cpu(family: str, kv: str, source_of: Callable[[str], ModelSource], tmp_path: Path) -> None:
    source = source_of(family)
    artifact = build_priced(source, tmp_path / "artifact", "sites", dtype="float16", kv=kv)
    checks = verify_artifact(artifact, lambda name: source, provider="cpu", quiet=True)
    assert [check for check in checks if not check.passed] == []
