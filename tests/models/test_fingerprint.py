"""Equal models have equal fingerprints, and different models have different ones."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tda_export.models import fingerprint as fingerprint_module
from tda_export.models.families import FAMILIES
from tda_export.models.fingerprint import BLOCK_BYTES, BLOCKS, ROPE_FIELDS, SPEC_FIELDS, fingerprint
from tda_export.models.source import resolve_model
from tda_export.models.spec import DecoderSpec, RopeSpec
from tests.tiny import save_tiny_model

FEW = 16  # blocks, in place of BLOCKS
WHOLE = FEW * BLOCK_BYTES  # the largest file that is then hashed whole
SPEC = DecoderSpec(
    architecture=next(iter(FAMILIES)),
    vocab_size=40,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    ffn_size=96,
    activation="silu",
    norm_epsilon=1e-5,
    rope=RopeSpec(1e4),
    max_positions=128,
    sliding_windows=(None, None),
    qkv_bias=False,
    attention_out_bias=False,
    ffn_bias=False,
    tied_head=True,
)


def pattern(size: int) -> bytearray:
    return bytearray(torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy())


def write(path: Path, content: bytes | bytearray) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def test_folder_and_name_do_not_matter(tiny_model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "elsewhere")
    first = resolve_model(str(tiny_model)).fingerprint
    assert resolve_model(str(copy)).fingerprint == first
    assert len(first) == 64
    assert int(first, 16) >= 0


def test_one_changed_weight_matters(tiny_model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "changed")
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][5, 7] += 1e-3
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert resolve_model(str(copy)).fingerprint != resolve_model(str(tiny_model)).fingerprint


def test_other_seed_and_other_architecture_matter(tmp_path: Path) -> None:
    folders = [
        save_tiny_model("llama", tmp_path / "0", seed=0),
        save_tiny_model("llama", tmp_path / "1", seed=1),
        save_tiny_model("llama-linear-rope", tmp_path / "2", seed=0),  # the same weights, with another rotation
    ]
    assert len({resolve_model(str(folder)).fingerprint for folder in folders}) == 3


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample FEW blocks, so that the files on both sides of the limit are small."""
    monkeypatch.setattr(fingerprint_module, "BLOCKS", FEW)


def test_files_of_up_to_32_mib_are_hashed_whole() -> None:
    assert (BLOCKS, BLOCK_BYTES) == (4096, 8192)
    assert BLOCKS * BLOCK_BYTES == 32 * 2**20


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("size", [0, 1, WHOLE - 1, WHOLE, WHOLE + 1, 2 * WHOLE + 12345])
def test_content_decides_at_every_size(size: int, tmp_path: Path) -> None:
    content = pattern(size)
    first = fingerprint(SPEC, [write(tmp_path / "a" / "model.safetensors", content)])
    assert fingerprint(SPEC, [write(tmp_path / "b" / "other.safetensors", content)]) == first
    assert fingerprint(SPEC, [write(tmp_path / "b" / "longer.safetensors", content + b"\0")]) != first


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("size", [WHOLE, WHOLE + 1, 2 * WHOLE + 12345])
@pytest.mark.parametrize("block", [0, 1, FEW // 2, FEW - 1])
@pytest.mark.parametrize("within", [0, BLOCK_BYTES - 1])
def test_one_byte_of_a_sampled_block_matters(size: int, block: int, within: int, tmp_path: Path) -> None:
    """Block b of n starts b/(n - 1) of the way from the first byte to the last block."""
    content = pattern(size)
    first = fingerprint(SPEC, [write(tmp_path / "model.safetensors", content)])
    content[(size - BLOCK_BYTES) * block // (FEW - 1) + within] ^= 1
    assert fingerprint(SPEC, [write(tmp_path / "model.safetensors", content)]) != first


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("position", [0, WHOLE // 2 + 17, WHOLE - 1])
def test_every_byte_of_a_file_that_is_hashed_whole_matters(position: int, tmp_path: Path) -> None:
    content = pattern(WHOLE)
    first = fingerprint(SPEC, [write(tmp_path / "model.safetensors", content)])
    content[position] ^= 1
    assert fingerprint(SPEC, [write(tmp_path / "model.safetensors", content)]) != first


@pytest.mark.parametrize(
    ("size", "position", "matters"),
    [
        (BLOCKS * BLOCK_BYTES, 20_000_001, True),  # hashed whole
        (3 * BLOCKS * BLOCK_BYTES, 0, True),
        (3 * BLOCKS * BLOCK_BYTES, BLOCK_BYTES, False),  # between the first two blocks
        (3 * BLOCKS * BLOCK_BYTES, 3 * BLOCKS * BLOCK_BYTES - 1, True),
    ],
    ids=["whole", "first", "between", "last"],
)
def test_large_files_are_sampled(size: int, position: int, matters: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(size)  # sparse
    first = fingerprint(SPEC, [path])
    with path.open("r+b") as file:
        file.seek(position)
        file.write(b"!")
    assert (fingerprint(SPEC, [path]) != first) == matters


def test_order_of_files_does_not_matter_but_each_file_does(tmp_path: Path) -> None:
    one, two = write(tmp_path / "1", b"one"), write(tmp_path / "2", b"two")
    both = fingerprint(SPEC, [one, two])
    assert fingerprint(SPEC, [two, one]) == both
    assert len({both, fingerprint(SPEC, [one]), fingerprint(SPEC, [two]), fingerprint(SPEC, [one, one])}) == 4


OTHER_SPEC = {
    "architecture": "MistralForCausalLM",
    "vocab_size": 41,
    "hidden_size": 128,
    "num_layers": 3,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_size": 32,
    "ffn_size": 97,
    "activation": "gelu",
    "norm_epsilon": 1e-6,
    "max_positions": 256,
    "sliding_windows": (None, 8),
    "tied_head": False,
}
LATER_SPEC: dict[str, Any] = {
    "gated": False,
    "norm": "layer",
    "norm_offset": 1.0,
    "norm_placement": "after",
    "final_norm": False,
    "parallel_residual": True,
    "position_offset": 2,
    "local_rope": RopeSpec(5.0),
    "rope_layers": (True, False),
    "rotary_size": 8,
    "embedding_size": 32,
    "embedding_scale": 8.0,
    "residual_scale": 0.5,
    "attention_scale": 0.1,
    "attention_softcap": 50.0,
    "logits_scale": 0.5,
    "logits_softcap": 30.0,
    "qk_norm": "head",
    "qkv_layout": "stacked",
    "transposed_linears": True,
}
LATER_ROPE: dict[str, Any] = {"frequencies": (1.0, 0.5), "attention_factor": 1.1}
OTHER_ROPE = {
    "theta": 2e4,
    "scaling": "linear",
    "factor": 2.0,
    "low_freq_factor": 2.0,
    "high_freq_factor": 4.0,
    "original_max_positions": 64,
}


@pytest.mark.parametrize("name", SPEC_FIELDS)
def test_architecture_matters(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", b"weights")
    other = dataclasses.replace(SPEC, **{name: OTHER_SPEC[name]})
    assert fingerprint(other, [path]) != fingerprint(SPEC, [path])


@pytest.mark.parametrize("name", ROPE_FIELDS)
def test_rotary_embedding_matters(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", b"weights")
    other = dataclasses.replace(SPEC, rope=dataclasses.replace(SPEC.rope, **{name: OTHER_ROPE[name]}))
    assert fingerprint(other, [path]) != fingerprint(SPEC, [path])


def test_every_field_that_weights_do_not_show_is_hashed() -> None:
    """Biases and names are visible in the weight files. Fields with a default are hashed if they have another value."""
    shown_by_weights = {"rope", "names", "qkv_bias", "attention_out_bias", "ffn_bias"}
    fields = {field.name for field in dataclasses.fields(DecoderSpec)}
    assert fields == set(SPEC_FIELDS) | shown_by_weights | set(LATER_SPEC)
    assert {field.name for field in dataclasses.fields(RopeSpec)} == set(ROPE_FIELDS) | set(LATER_ROPE)


@pytest.mark.parametrize("name", LATER_SPEC)
def test_later_fields_matter(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", b"weights")
    assert fingerprint(dataclasses.replace(SPEC, **{name: LATER_SPEC[name]}), [path]) != fingerprint(SPEC, [path])


@pytest.mark.parametrize("name", LATER_ROPE)
def test_later_fields_of_rotary_embeddings_matter(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", b"weights")
    other = dataclasses.replace(SPEC, rope=dataclasses.replace(SPEC.rope, **{name: LATER_ROPE[name]}))
    assert fingerprint(other, [path]) != fingerprint(SPEC, [path])


def test_fields_of_later_families_make_no_new_model_of_an_old_one(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class LaterSpec(DecoderSpec):
        logit_scale: float = 1.0

    path = write(tmp_path / "model.safetensors", b"weights")
    later = LaterSpec(**{field.name: getattr(SPEC, field.name) for field in dataclasses.fields(SPEC)})
    assert fingerprint(later, [path]) == fingerprint(SPEC, [path])
