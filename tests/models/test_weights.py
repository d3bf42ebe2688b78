"""Checkpoint folders are read lazily, and only from safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tda_export.errors import TdaError
from tda_export.models import weights as weights_module
from tda_export.models.weights import INDEX_FILE, SINGLE_FILE, StateDictWeights, Weights, open_safetensors

TENSORS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "b.weight": torch.arange(4.0).bfloat16(),
    "c.bias": torch.tensor([7.0]),
}
SHARDS = {"model-1-of-2.safetensors": ["a.weight"], "model-2-of-2.safetensors": ["b.weight", "c.bias"]}


def write_single(folder: Path) -> Path:
    save_file(TENSORS, folder / SINGLE_FILE)
    return folder


def write_shards(folder: Path) -> Path:
    for file, names in SHARDS.items():
        save_file({name: TENSORS[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in SHARDS.items() for name in names}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture(params=["single", "shards", "state-dict"])
def weights(request: pytest.FixtureRequest, tmp_path: Path) -> Weights:
    if request.param == "state-dict":
        return StateDictWeights({name: torch.nn.Parameter(tensor) for name, tensor in TENSORS.items()})
    return open_safetensors((write_single if request.param == "single" else write_shards)(tmp_path))


def test_tensors_are_read_as_they_were_written(weights: Weights) -> None:
    for name, tensor in TENSORS.items():
        assert name in weights
        assert weights.shape(name) == tuple(tensor.shape)
        loaded = weights.load(name)
        assert torch.equal(loaded, tensor)
        assert loaded.dtype == tensor.dtype
        assert not loaded.requires_grad
    assert "d.weight" not in weights


def test_shards_of_transformers_are_read(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    weights = open_safetensors(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights.load(name), tensor)


@pytest.fixture
def read_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of the tensors that are read."""
    names: list[str] = []
    open_file = weights_module.safe_open

    class Observed:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._file = open_file(*arguments, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def get_tensor(self, name: str) -> torch.Tensor:
            names.append(name)
            return self._file.get_tensor(name)

    monkeypatch.setattr(weights_module, "safe_open", Observed)
    return names


@pytest.mark.parametrize("write", [write_single, write_shards])
def test_only_what_is_asked_for_is_read(write: Any, tmp_path: Path, read_names: list[str]) -> None:
    weights = open_safetensors(write(tmp_path))
    assert "a.weight" in weights
    assert weights.shape("a.weight") == (2, 3)
    assert read_names == []
    weights.load("b.weight")
    assert read_names == ["b.weight"]


def test_single_file_comes_before_an_index(tmp_path: Path) -> None:
    """As in transformers, which loads the reference."""
    write_shards(tmp_path)
    save_file({"a.weight": torch.zeros(2, 3)}, tmp_path / SINGLE_FILE)
    weights = open_safetensors(tmp_path)
    assert weights.files == [tmp_path / SINGLE_FILE]
    assert torch.equal(weights.load("a.weight"), torch.zeros(2, 3))


def test_order_is_that_of_transformers(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(folder, max_shard_size="100KB")
    tensors = load_file(tiny_model / SINGLE_FILE)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / SINGLE_FILE, metadata={"format": "pt"})
    reference, weights = AutoModelForCausalLM.from_pretrained(folder), open_safetensors(folder)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(weights.load(name), tensor)


# Refused


@pytest.mark.parametrize("name", ["../secret.safetensors", "/secret.safetensors", "sub/../../secret.safetensors"])
def test_index_that_names_a_file_outside_its_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(TENSORS, tmp_path / "secret.safetensors")
    shard = str(tmp_path / "secret.safetensors") if name.startswith("/") else name
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, shard)}))
    message = (
        rf"^{folder}: {INDEX_FILE} names a file outside the folder \('.+'\)\. "
        r"Download the index again from a place that you trust\.$"
    )
    with pytest.raises(TdaError, match=message):
        open_safetensors(folder)


def test_shard_that_is_a_link_to_outside(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    outside = (write_shards(folder) / "model-1-of-2.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model-1-of-2.safetensors").symlink_to(outside)
    message = (
        rf"^{folder}: 'model-1-of-2\.safetensors' is a link to a file outside the folder\. Copy that file into it\.$"
    )
    with pytest.raises(TdaError, match=message):
        open_safetensors(folder)


def test_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(write_shards(snapshot).iterdir())):
        file.rename(blobs / f"blob{number}")
        file.symlink_to(Path("..", "..", "blobs", f"blob{number}"))
    assert torch.equal(open_safetensors(snapshot).load("a.weight"), TENSORS["a.weight"])


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    message = (
        rf"no {SINGLE_FILE} and no {INDEX_FILE}\. Only safetensors and GGUF weights are read; pickled \.bin files are "
        r"not\. Convert the model with transformers' save_pretrained\(\)\.$"
    )
    with pytest.raises(TdaError, match=message):
        open_safetensors(tmp_path)


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(TdaError, match=rf"^{tmp_path}: no {SINGLE_FILE} and no"):
        open_safetensors(tmp_path)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    (write_shards(tmp_path) / "model-2-of-2.safetensors").unlink()
    message = rf"{INDEX_FILE} names .model-2-of-2\.safetensors., which is missing\. Download that file\.$"
    with pytest.raises(TdaError, match=message):
        open_safetensors(tmp_path)


@pytest.mark.parametrize("index", ["", "{", "{}", "[]", "null", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_damaged_index(index: str, tmp_path: Path) -> None:
    (write_shards(tmp_path) / INDEX_FILE).write_text(index)
    with pytest.raises(
        TdaError, match=r"the safetensors weights cannot be read \(.+\)\. Download the weights again\.$"
    ):
        open_safetensors(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 40, -1])
@pytest.mark.parametrize(("write", "file"), [(write_single, SINGLE_FILE), (write_shards, "model-2-of-2.safetensors")])
def test_truncated_file(kept: int, write: Any, file: str, tmp_path: Path) -> None:
    path = write(tmp_path) / file
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(
        TdaError, match=r"the safetensors weights cannot be read \(.+\)\. Download the weights again\.$"
    ):
        open_safetensors(tmp_path)


def test_names_of_models_without_their_head_and_of_older_versions(tmp_path: Path) -> None:
    """Some checkpoints on the hub lack the model's prefix, and GPT-NeoX's head has had another name."""
    save_file({"h.0.weight": torch.ones(2), "embed_out.weight": torch.zeros(3)}, tmp_path / SINGLE_FILE)
    weights = open_safetensors(tmp_path)
    for name, expected in (("transformer.h.0.weight", torch.ones(2)), ("lm_head.weight", torch.zeros(3))):
        assert name in weights
        assert weights.shape(name) == tuple(expected.shape)
        assert torch.equal(weights.load(name), expected)
    assert "transformer.h.1.weight" not in weights
