"""A model in a GGUF file, whole and damaged."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy
import pytest
import torch

from tda_export.errors import TdaError
from tda_export.models.gguf_header import ROPE_FACTORS
from tda_export.models.source import ModelSource, resolve_model
from tests.models.test_source import WAY_OUT, no_notice

LINEAR = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
GGUF_TENSORS: dict[str, tuple[int, ...]] = {
    "token_embd.weight": (8, 32),
    "output_norm.weight": (32,),
    "output.weight": (8, 32),
    **{f"blk.0.{name}.weight": (32, 32) for name in LINEAR},
    **{f"blk.0.{name}.weight": (32,) for name in ("attn_norm", "ffn_norm")},
}


def write_gguf(
    path: Path,
    tensors: dict[str, tuple[int, ...]] = GGUF_TENSORS,
    *,
    architecture: str = "llama",
    blocks: int = 1,
    further: dict[str, str | int | float] | None = None,
    left_out: Sequence[str] = (),
) -> ModelSource:
    """Write a model with tensors of these shapes and further keys, and resolve it.

    `left_out`: keys to leave out, without the architecture's name.
    """
    writer = gguf.GGUFWriter(path, architecture)
    adders = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
    for key, value in (further or {}).items():
        adders[type(value)](f"{architecture}.{key}", value)
    keys: dict[str, int | float] = {
        "context_length": 64,
        "embedding_length": 32,
        "block_count": blocks,
        "feed_forward_length": 32,
        "attention.head_count": 2,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 1e4,
        "vocab_size": 8,
    }
    for key, number in keys.items():
        if key not in left_out and key not in (further or {}):
            adders[type(number)](f"{architecture}.{key}", number)
    for seed, (name, shape) in enumerate(tensors.items()):
        writer.add_tensor(name, numpy.random.default_rng(seed).standard_normal(shape, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return resolve_model(str(path), notify=no_notice)


def test_gguf(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "model.gguf", GGUF_TENSORS)
    spec = source.spec
    assert (spec.architecture, spec.num_layers, spec.head_size) == ("LlamaForCausalLM", 1, 16)
    assert len(source.fingerprint) == 64
    weights = source.weights()
    for name, parameter in source.reference().named_parameters():
        assert torch.equal(parameter, weights.load(name))


@pytest.mark.parametrize("name", ROPE_FACTORS)
def test_gguf_with_rope_factors_is_refused(name: str, tmp_path: Path) -> None:
    """They are the scaling of Llama 3.1 or Phi. transformers ignores them, and would rotate wrongly."""
    assert "rope_freqs.weight" in ROPE_FACTORS
    source = write_gguf(tmp_path / "model.gguf", GGUF_TENSORS | {name: (8,)})
    message = (
        rf"model\.gguf: its rope scaling \({name}\) is not read from GGUF files\. "
        r"Give the safetensors checkpoint of this model\.$"
    )
    for what in ("spec", "fingerprint"):
        with pytest.raises(TdaError, match=message):
            getattr(source, what)


@pytest.mark.parametrize(
    ("architecture", "blocks", "further", "what"),
    [
        (
            "gemma3",
            34,
            {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
            "rope scaling (gemma3.rope.scaling.type = linear)",
        ),
        ("llama", 1, {"rope.scaling.type": "yarn"}, "rope scaling (llama.rope.scaling.type = yarn)"),
        ("llama", 1, {"rope.scaling.factor": 4.0}, "rope scaling (llama.rope.scaling.factor = 4.0)"),
        ("llama", 1, {"rope.scale_linear": 2.0}, "rope scaling (llama.rope.scale_linear = 2.0)"),
        ("phi3", 1, {"attention.sliding_window": 63}, "sliding window (phi3.attention.sliding_window = 63)"),
        ("gemma2", 46, {}, "attention scale (gemma2 with 46 blocks)"),
        ("gemma3", 62, {}, "attention scale (gemma3 with 62 blocks)"),
    ],
)
def test_gguf_that_says_what_is_not_read_is_refused(
    architecture: str, blocks: int, further: dict[str, str | int | float], what: str, tmp_path: Path
) -> None:
    source = write_gguf(tmp_path / "model.gguf", architecture=architecture, blocks=blocks, further=further)
    message = (
        rf"^{re.escape(source.name)}: its {re.escape(what)} is not read from GGUF files\. "
        r"Give the safetensors checkpoint of this model\.$"
    )
    with pytest.raises(TdaError, match=message):
        _ = source.spec


@pytest.mark.parametrize(
    ("architecture", "blocks", "further"),
    [
        ("llama", 1, {"rope.scaling.type": "none"}),
        ("llama", 1, {"rope.scaling.factor": 1.0}),
        ("phi3", 1, {"attention.sliding_window": 0}),
        ("phi3", 1, {"attention.sliding_window": 64}),  # equal to the context
        ("gemma2", 26, {"attention.sliding_window": 16}),
        ("gemma3", 34, {"attention.sliding_window": 16}),
        ("qwen2", 46, {}),
    ],
)
def test_gguf_whose_keys_are_read_or_say_nothing(
    architecture: str, blocks: int, further: dict[str, str | int | float], tmp_path: Path
) -> None:
    spec = write_gguf(tmp_path / "model.gguf", architecture=architecture, blocks=blocks, further=further).spec
    assert spec.num_layers == blocks
    assert spec.rope is not None
    assert spec.rope.scaling == "default"
    assert (16 in spec.sliding_windows) == architecture.startswith("gemma")


@pytest.mark.parametrize(
    "key",
    [
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ],
)
def test_gguf_that_leaves_a_size_to_the_default_model_is_refused(key: str, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "model.gguf", left_out=[key])
    message = (
        rf"model\.gguf: the GGUF file does not say llama\.{re.escape(key)}, which every model needs\. "
        r"Give another GGUF file or the safetensors checkpoint of this model\.$"
    )
    for part in ("config", "spec", "tokenizer", "reference"):
        with pytest.raises(TdaError, match=message):
            source.reference() if part == "reference" else getattr(source, part)


def test_gguf_without_the_size_of_its_vocabulary_is_refused(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "model.gguf", left_out=["vocab_size"])
    with pytest.raises(TdaError, match=r"says neither llama\.vocab_size nor tokenizer\.ggml\.tokens\. Give another"):
        _ = source.spec


@pytest.mark.parametrize("key", ["block_count", "embedding_length", "attention.head_count", "rope.dimension_count"])
@pytest.mark.parametrize("value", [0, 2**31])
def test_size_of_a_gguf_that_cannot_be_is_named(key: str, value: int, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "model.gguf", further={key: value})
    message = rf"model\.gguf: {re.escape(key)} in its llama keys is {value}, which is not a whole number from 1 to"
    with pytest.raises(TdaError, match=message):
        _ = source.spec


@pytest.mark.parametrize("load", ["weights", "reference"])
def test_gguf_of_a_far_larger_model_is_refused_before_it_is_made(
    load: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = {"embedding_length": 2**16, "attention.head_count": 4096, "attention.head_count_kv": 4096}
    source = write_gguf(tmp_path / "model.gguf", further=large)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(
        TdaError, match=r"the configuration is of a model of [\d,]{14,} weights, and the checkpoint has"
    ):
        getattr(source, load)()


@pytest.mark.parametrize("load", ["weights", "reference"])
def test_missing_tensor_of_a_gguf_is_named(load: str, tmp_path: Path) -> None:
    tensors = {name: shape for name, shape in GGUF_TENSORS.items() if "ffn_up" not in name}
    source = write_gguf(tmp_path / "model.gguf", tensors)
    message = r"model\.gguf: the checkpoint does not fit its .+ \(missing: model\.layers\.0\.mlp\.up_proj\.weight\)"
    with pytest.raises(TdaError, match=message):
        getattr(source, load)()


@pytest.mark.parametrize("load", ["weights", "reference"])
def test_tensor_of_another_shape_in_a_gguf_is_named(load: str, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "model.gguf", GGUF_TENSORS | {"blk.0.ffn_up.weight": (31, 32)})
    with pytest.raises(TdaError, match=r"model\.gguf: .*model\.layers\.0\.mlp\.up_proj\.weight"):
        getattr(source, load)()


def test_missing_gguf(tmp_path: Path) -> None:
    with pytest.raises(TdaError, match=rf"model\.gguf: no such file\. {WAY_OUT}"):
        resolve_model(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04 and more"])
def test_file_that_is_no_gguf(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(TdaError, match=rf"model\.gguf: not a GGUF file\. {WAY_OUT}"):
        resolve_model(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    "content",
    [b"GGUF", b"GGUF" + struct.pack("<IQQ", 3, 5, 5), b"GGUF" + struct.pack("<IQQ", 3, 0, 0)],
    ids=["magic-only", "header-only", "nothing-in-it"],
)
@pytest.mark.parametrize("part", ["config", "spec", "tokenizer", "weights"])
def test_damaged_gguf(content: bytes, part: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    source = resolve_model(str(path), notify=no_notice)
    assert (source.folder, source.gguf) == (tmp_path, "model.gguf")
    with pytest.raises(TdaError, match=rf"model\.gguf: the model cannot be loaded \(.+\)\. {WAY_OUT}") as caught:
        source.weights() if part == "weights" else getattr(source, part)
    assert "\n" not in str(caught.value)
