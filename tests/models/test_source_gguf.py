"""A model in a GGUF file, whole and damaged."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy
import pytest
import torch

from tda_export.errors import TdaError
from tda_export.models.source import GGUF_ROPE_FACTORS, ModelSource, resolve_model
from tests.models.test_source import WAY_OUT, no_notice

LINEAR = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
GGUF_TENSORS: dict[str, tuple[int, ...]] = {
    "token_embd.weight": (8, 32),
    "output_norm.weight": (32,),
    "output.weight": (8, 32),
    **{f"blk.0.{name}.weight": (32, 32) for name in LINEAR},
    **{f"blk.0.{name}.weight": (32,) for name in ("attn_norm", "ffn_norm")},
}


def write_gguf(path: Path, tensors: dict[str, tuple[int, ...]]) -> ModelSource:
    """Write a llama of one layer with tensors of these shapes, and resolve it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(8)
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


@pytest.mark.parametrize("name", GGUF_ROPE_FACTORS)
def test_gguf_with_rope_factors_is_refused(name: str, tmp_path: Path) -> None:
    """They are Llama 3.1's or Phi's scaling; transformers passes over them, and the model would rotate wrongly."""
    assert "rope_freqs.weight" in GGUF_ROPE_FACTORS
    source = write_gguf(tmp_path / "model.gguf", GGUF_TENSORS | {name: (8,)})
    message = (
        rf"model\.gguf: its rope scaling \({name}\) is not read from GGUF files\. "
        r"Give the safetensors checkpoint of this model\.$"
    )
    for what in ("spec", "fingerprint"):
        with pytest.raises(TdaError, match=message):
            getattr(source, what)


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
