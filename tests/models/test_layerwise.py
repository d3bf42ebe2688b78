"""A model with one layer in memory at a time gives the results of the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tda_export.errors import TdaError
from tda_export.models import transfer
from tda_export.models.layerwise import LayerwiseModel, layer_module
from tda_export.models.source import resolve_model
from tda_export.models.transfer import to_device
from tda_export.quantization.layers import first_inputs, last_log_probabilities, layer_calls, pass_on
from tests.tiny import FAMILIES, save_tiny_model

TOKENS = torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(0))
KEPT = 8


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_layers_one_at_a_time_are_the_model(name: str, tmp_path: Path) -> None:
    source = resolve_model(str(save_tiny_model(name, tmp_path)))
    layerwise, whole = LayerwiseModel(source, "cpu"), source.reference()
    model, spec = layerwise.model, source.spec
    calls, hidden = layer_calls(model, spec, TOKENS[0]), first_inputs(model, spec, TOKENS)
    for layer in range(spec.num_layers):
        with layerwise.layer(layer):
            pass_on(calls[layer], hidden, layerwise.device)
    for sequence, left in zip(TOKENS, hidden, strict=True):
        with torch.no_grad():
            expected = whole(sequence[None], logits_to_keep=KEPT).logits[0].log_softmax(dim=-1)
        assert torch.equal(last_log_probabilities(model, spec, sequence, left, KEPT), expected)


def has_weights(module: torch.nn.Module) -> set[bool]:
    return {parameter.device.type != "meta" for parameter in module.parameters()}


def test_one_layer_has_weights(tiny_model: Path) -> None:
    """Also after an error inside the block. Changes to a layer are lost."""
    source = resolve_model(str(tiny_model))
    layerwise = LayerwiseModel(source, "cpu")
    layers = [layer_module(layerwise.model, source.spec, layer) for layer in range(source.spec.num_layers)]
    assert [has_weights(each) for each in layers] == [{False}] * 3

    def fail() -> None:
        with layerwise.layer(1):
            assert [has_weights(each) for each in layers] == [{False}, {True}, {False}]
            for parameter in layers[1].parameters():
                parameter.data = torch.full_like(parameter, torch.nan)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [has_weights(each) for each in layers] == [{False}] * 3
    with layerwise.layer(1):
        assert all(parameter.isfinite().all() for parameter in layers[1].parameters())
    inside = sum(parameter.numel() for each in layers for parameter in each.parameters())
    outside = [parameter for parameter in layerwise.model.parameters() if parameter.device.type != "meta"]
    assert sum(each.numel() for each in outside) == sum(map(torch.numel, layerwise.model.parameters())) - inside


def test_weights_that_the_caller_sets(tiny_model: Path) -> None:
    source = resolve_model(str(tiny_model))
    layerwise = LayerwiseModel(source, "cpu")
    layer = layer_module(layerwise.model, source.spec, 1)
    module = "model.layers.1.mlp.down_proj"
    with layerwise.layer(1, unread=[f"{module}.weight"]):
        assert [name for name, each in layer.named_parameters() if each.is_meta] == ["mlp.down_proj.weight"]
        weight = torch.full(layer.mlp.down_proj.weight.shape, 0.5, dtype=torch.bfloat16)
        layerwise.put(module, weight)
        assert torch.equal(layer.mlp.down_proj.weight, weight.float())
    assert has_weights(layer) == {False}


@pytest.mark.gpu
@pytest.mark.parametrize("piece", [1, 6, 1 << 26])
def test_copies_to_a_gpu(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PIECE", piece)
    for tensor in (torch.randn(5, 7), torch.randn(5, 7).T, torch.randn(9, 4).bfloat16()[2:5], torch.zeros(0, 3)):
        copied = to_device(tensor, "cuda")
        assert copied.is_cuda
        assert torch.equal(copied.cpu(), tensor)


def test_a_tied_head_stays_the_embedding(tmp_path: Path) -> None:
    source = resolve_model(str(save_tiny_model("llama-tied", tmp_path)))
    model = LayerwiseModel(source, "cpu").model
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"), "missing"),
        (
            lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(96, 63)}),
            "of another shape",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit(
    change: Callable[[dict[str, torch.Tensor]], Any], problem: str, tmp_path: Path
) -> None:
    """It is refused before any layer is read."""
    folder = save_tiny_model("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = rf"does not fit its configuration \({problem}: model\.layers\.1\.mlp\.up_proj\.weight\)\. Take config"
    with pytest.raises(TdaError, match=message):
        LayerwiseModel(resolve_model(str(folder)), "cpu")
