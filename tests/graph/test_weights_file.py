"""weights.bin: its layout, and checkpoints that do not fit their configuration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tda_export.errors import TdaError
from tda_export.graph import contract
from tda_export.graph.ops import to_numpy
from tda_export.graph.storage import Storage
from tda_export.graph.weight_plan import IndexedRows, plan_weights
from tda_export.graph.weights_file import ALIGNMENT, write_weights
from tda_export.models.source import resolve_model
from tests.tiny import save_tiny_model


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return save_tiny_model("llama-biases", tmp_path / "model")


def change_weight(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensors_lie_where_the_table_says(model_folder: Path, tmp_path: Path, dtype: str) -> None:
    source = resolve_model(str(model_folder))
    weights = source.weights()
    up_rms = torch.rand(source.spec.num_layers, source.spec.ffn_size)
    advanced: list[int] = []
    table, digest = write_weights(
        list(plan_weights(source.spec, weights, Storage(dtype), IndexedRows(up_rms))),
        tmp_path / "weights.bin",
        advanced.append,
    )
    content = (tmp_path / "weights.bin").read_bytes()
    assert len(digest) == 64
    assert sum(advanced) == sum(tensor.length for tensor in table.values())
    assert all(tensor.offset % ALIGNMENT == 0 for tensor in table.values())

    def stored(name: str) -> np.ndarray:
        tensor = table[name]
        return np.frombuffer(
            content, tensor.dtype.numpy(), count=int(np.prod(tensor.shape.numpy())), offset=tensor.offset
        ).reshape(tensor.shape.numpy())

    def original(name: str) -> np.ndarray:
        return to_numpy(weights.load(f"model.layers.1.{name}").numpy(), dtype)

    np.testing.assert_array_equal(stored(contract.ffn_weight(1, "gate")), original("mlp.gate_proj.weight"))
    np.testing.assert_array_equal(stored(contract.ffn_weight(1, "down")), original("mlp.down_proj.weight").T)
    packed = np.concatenate([original(f"self_attn.{part}_proj.weight") for part in "qkv"])
    np.testing.assert_array_equal(stored(contract.qkv_weight(1)), packed)
    biases = np.concatenate([original(f"self_attn.{part}_proj.bias") for part in "qkv"])
    np.testing.assert_array_equal(stored(contract.qkv_bias(1)), biases)
    squares = (weights.load("model.layers.1.mlp.down_proj.weight") ** 2).sum(dim=0)
    np.testing.assert_allclose(stored(contract.down_squared_norms(1)), squares, rtol=1e-6)
    np.testing.assert_allclose(stored(contract.neuron_scale(1)), squares.sqrt() * up_rms[1], rtol=1e-6)


def test_missing_tensor(model_folder: Path) -> None:
    change_weight(model_folder, "model.layers.1.mlp.up_proj.weight", None)
    source = resolve_model(str(model_folder))
    with pytest.raises(TdaError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing from the checkpoint"):
        list(plan_weights(source.spec, source.weights(), Storage("float32")))


def test_tensor_of_another_shape(model_folder: Path) -> None:
    change_weight(model_folder, "model.layers.2.mlp.down_proj.weight", torch.zeros(96, 64))
    source = resolve_model(str(model_folder))
    with pytest.raises(
        TdaError, match=r"down_proj\.weight: config\.json says shape \[64, 96\], the checkpoint has \[96, 64\]"
    ):
        list(plan_weights(source.spec, source.weights(), Storage("float32")))
