"""Equal models have equal fingerprints, and different ones do not."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tda_export.models.families import FAMILIES
from tda_export.models.fingerprint import BLOCK_BYTES, BLOCKS, fingerprint
from tda_export.models.source import resolve_model
from tda_export.models.spec import DecoderSpec, RopeSpec
from tests.tiny import save_tiny_model

WHOLE = BLOCKS * BLOCK_BYTES  # the largest file that is hashed whole
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
        save_tiny_model("llama-linear-rope", tmp_path / "2", seed=0),  # the same weights, rotated otherwise
    ]
    assert len({resolve_model(str(folder)).fingerprint for folder in folders}) == 3


@pytest.mark.parametrize("size", [0, 1, WHOLE - 1, WHOLE, WHOLE + 1, 2 * WHOLE + 12345])
def test_content_decides_at_every_size(size: int, tmp_path: Path) -> None:
    content = pattern(size)
    first = fingerprint(SPEC, [write(tmp_path / "a" / "model.safetensors", content)])
    assert fingerprint(SPEC, [write(tmp_path / "b" / "other.safetensors", content)]) == first
    assert fingerprint(SPEC, [write(tmp_path / "b" / "longer.safetensors", content + b"\0")]) != first


@pytest.mark.parametrize("size", [WHOLE, WHOLE + 1, 2 * WHOLE + 12345])
@pytest.mark.parametrize("block", [0, 1, BLOCKS // 2, BLOCKS - 1])
@pytest.mark.parametrize("within", [0, BLOCK_BYTES - 1])
def test_one_byte_of_a_sampled_block_matters(size: int, block: int, within: int, tmp_path: Path) -> None:
    """Block b starts b/63 of the way from the first byte to the last block."""
    content = pattern(size)
    first = fingerprint(SPEC, [write(tmp_path / "model.safetensors", content)])
    content[(size - BLOCK_BYTES) * block // (BLOCKS - 1) + within] ^= 1
    assert fingerprint(SPEC, [write(tmp_path / "model.safetensors", content)]) != first


@pytest.mark.parametrize("position", [0, WHOLE // 2 + 17, WHOLE - 1])
def test_every_byte_of_a_file_of_4_mib_matters(position: int, tmp_path: Path) -> None:
    content = pattern(WHOLE)
    first = fingerprint(SPEC, [write(tmp_path / "model.safetensors", content)])
    content[position] ^= 1
    assert fingerprint(SPEC, [write(tmp_path / "model.safetensors", content)]) != first


def test_order_of_files_does_not_matter_but_each_file_does(tmp_path: Path) -> None:
    one, two = write(tmp_path / "1", b"one"), write(tmp_path / "2", b"two")
    both = fingerprint(SPEC, [one, two])
    assert fingerprint(SPEC, [two, one]) == both
    assert len({both, fingerprint(SPEC, [one]), fingerprint(SPEC, [two]), fingerprint(SPEC, [one, one])}) == 4


@pytest.mark.parametrize(
    "change",
    [{"norm_epsilon": 1e-6}, {"rope": RopeSpec(2e4)}, {"sliding_windows": (None, 8)}, {"tied_head": False}],
    ids=lambda change: next(iter(change)),
)
def test_architecture_matters(change: dict[str, object], tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", b"weights")
    assert fingerprint(dataclasses.replace(SPEC, **change), [path]) != fingerprint(SPEC, [path])
