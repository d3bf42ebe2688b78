"""Every family against transformers: prefill, decode, masks, chunks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tda_export.calibration.budgets import Budget
from tda_export.errors import TdaError
from tda_export.graph import kv_formats
from tda_export.graph.comparison import PROMPTS
from tda_export.graph.export import BuildRequest, export_artifact
from tda_export.graph.indexed import IndexedDesign
from tda_export.graph.method import Method, griffin, tda
from tda_export.graph.storage import Storage
from tda_export.graph.verify import verify_artifact
from tda_export.models.source import ModelSource, resolve_model
from tests.tiny import FAMILIES, save_tiny_model

THRESHOLD = 0.08  # about half of 96 neurons score more than this


def build_tiny(
    source: ModelSource,
    output: Path,
    *,
    method: Method | None = None,
    dtype: str = "float32",
    kv: str = kv_formats.KV_FLOAT,
) -> Path:
    method = method or tda("mean", two_levels=True)
    spec = source.spec
    up_rms = torch.ones(spec.num_layers, spec.ffn_size) if method.two_levels else None
    design = IndexedDesign(method, [THRESHOLD] * spec.num_layers, up_rms=up_rms)
    request = BuildRequest(source, Storage(dtype), design, Budget(sparsity=0.5).describe(), kv=kv)
    export_artifact(request, output, quiet=True, check=lambda folder: None)
    return output


@pytest.mark.parametrize("family", FAMILIES)
def test_family_matches_transformers(family: str, tmp_path: Path) -> None:
    source = resolve_model(str(save_tiny_model(family, tmp_path / "model")))
    artifact = build_tiny(source, tmp_path / "artifact")
    checks = verify_artifact(artifact, lambda name: source, provider="cpu", quiet=True)
    assert len(checks) == 16
    assert [check for check in checks if not check.passed] == []


@pytest.mark.parametrize(
    ("family", "kv"),
    [
        *((family, kv_formats.KV_INT8) for family in FAMILIES),
        *((family, kv_formats.KV_FLOAT16) for family in ("gemma2", "opt-post-norm", "gpt-neox", "phi3", "phi4-mini")),
    ],
)
def test_family_with_stored_keys_and_values(family: str, kv: str, tmp_path: Path) -> None:
    """By the kernel in decode, and by stock operators in prefill."""
    source = resolve_model(str(save_tiny_model(family, tmp_path / "model")))
    artifact = build_tiny(source, tmp_path / "artifact", kv=kv)
    checks = verify_artifact(artifact, lambda name: source, provider="cpu", quiet=True)
    assert [check for check in checks if not check.passed] == []
    assert all(check.difference for check in checks if check.name.endswith("logits"))


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


@pytest.mark.parametrize("positions", [3, 4, 9, 512])
def test_tokenizer_that_makes_one_token_of_a_text(positions: int, tmp_path: Path) -> None:
    """Other tokens follow if there are too few to compare."""
    folder = save_tiny_model("llama", tmp_path / "model", max_position_embeddings=positions)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "word": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    source = resolve_model(str(folder))
    assert len(source.tokenizer(PROMPTS[0]).input_ids) == 1
    artifact = build_tiny(source, tmp_path / "artifact")
    checks = verify_artifact(artifact, lambda name: source, provider="cpu", quiet=True)
    assert len(checks) == 16
    assert [check for check in checks if not check.passed] == []


def test_context_without_room_for_an_answer(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "model", max_position_embeddings=2)
    message = (
        r"a context of 2 tokens has no room for a prompt and an answer\. Check max_position_embeddings in config\.json"
    )
    with pytest.raises(TdaError, match=message):
        _ = resolve_model(str(folder)).spec


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_head_of_its_own_beside_a_configuration_that_ties_it(family: str, tmp_path: Path) -> None:
    folder = save_tiny_model(family, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(259, 64, generator=torch.Generator().manual_seed(1)) / 8
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = resolve_model(str(folder))
    checks = verify_artifact(build_tiny(source, tmp_path / "artifact"), lambda name: source, provider="cpu", quiet=True)
    assert [check for check in checks if not check.passed] == []
