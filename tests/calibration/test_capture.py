"""The hooks capture the right values, and are removed afterwards."""

from __future__ import annotations

import pytest
import torch

from tda_export.calibration.capture import capture_activations
from tda_export.models.source import ModelSource, resolve_model
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module", params=["llama", "llama-biases", "qwen2"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return resolve_model(str(save_tiny_model(request.param, tmp_path_factory.mktemp("capture") / request.param)))


def test_captured_activations_are_those_of_the_definition(source: ModelSource) -> None:
    model = source.reference()
    expected: dict[int, torch.Tensor] = {}
    handles = [
        block.mlp.register_forward_hook(
            lambda mlp, inputs, output, layer=layer: expected.__setitem__(
                layer, torch.nn.functional.silu(mlp.gate_proj(inputs[0][0])) * mlp.up_proj(inputs[0][0])
            )
        )
        for layer, block in enumerate(model.model.layers)
    ]
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    with torch.inference_mode(), capture_activations(model, source.spec, lambda *call: seen.append(call)):
        model(torch.arange(5, 15)[None], use_cache=False)
    for handle in handles:
        handle.remove()
    assert [layer for layer, _, _ in seen] == [0, 1, 2]
    for layer, h, down in seen:
        torch.testing.assert_close(h, expected[layer])  # [T, F]
        assert torch.equal(down, model.model.layers[layer].mlp.down_proj.weight)


def test_hooks_are_gone_even_after_a_failure(source: ModelSource) -> None:
    model, calls = source.reference(), []
    with pytest.raises(KeyboardInterrupt), capture_activations(model, source.spec, lambda *call: calls.append(call)):
        raise KeyboardInterrupt
    model(torch.arange(5, 15)[None], use_cache=False)
    assert calls == []


def test_only_the_given_model_is_observed(source: ModelSource) -> None:
    calls: list[object] = []
    with capture_activations(source.reference(), source.spec, lambda *call: calls.append(call)):
        source.reference()(torch.arange(5, 15)[None], use_cache=False)
    assert calls == []
