"""Threshold truncation against transformers, with r_i(t) by definition, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from tda_export.graph import contract, operators
from tda_export.graph.derive import artifact_spec, truncation_sessions, weight_table
from tda_export.graph.method import griffin
from tda_export.graph.truncation import build_truncation, truncation_inputs, truncation_outputs
from tda_export.models.source import ModelSource, resolve_model
from tda_export.runtime import Model, load
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import bind_call, decode, prefill
from tda_export.runtime.session import Call, Sessions, device_tensor
from tests.graph.test_parity import build_tiny
from tests.tiny import save_tiny_model

PROMPT, CONTINUATION = list(range(3, 15)), [40, 90, 17, 151, 33]
THRESHOLDS = [0.05, 0.08, 0.03]
LOGITS_TOLERANCE = 2e-4
NEAR = 1e-5  # to a threshold; so close, rounding may decide


def truncated(
    model: Any, source: ModelSource, thresholds: list[float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read the prompt densely, the continuation truncated. Return logits [C, V], kept [L, C], and the smallest margin.

    It takes one token, and the condition of one neuron, at a time.
    """
    names, kept, closest = source.spec.names, torch.zeros(3, len(CONTINUATION), dtype=torch.int64), torch.tensor(1.0)
    handles = []

    def truncate(layer: int) -> Any:
        norms = model.get_submodule(names.down.format(i=layer)).weight.norm(dim=0)

        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            nonlocal closest
            h = inputs[0].clone()
            for token in range(h.shape[1]):
                magnitude = h[0, token].abs() * norms
                length = magnitude.square().sum().sqrt()
                for neuron in range(len(magnitude)):
                    r = magnitude[neuron] / length
                    closest = torch.minimum(closest, (r - thresholds[layer]).abs())
                    if r >= thresholds[layer]:
                        kept[layer, token] += 1
                    else:
                        h[0, token, neuron] = 0.0
            return (h,)

        return hook

    with torch.inference_mode():
        cache = model(torch.tensor([PROMPT]), use_cache=True).past_key_values
        for layer in range(3):
            handles.append(model.get_submodule(names.down.format(i=layer)).register_forward_pre_hook(truncate(layer)))
        logits = model(torch.tensor([CONTINUATION]), past_key_values=cache).logits[0]
    for handle in handles:
        handle.remove()
    return logits, kept, closest


def run_truncated(loaded: Model, sessions: Sessions, thresholds: list[float] | None) -> tuple[np.ndarray, np.ndarray]:
    """Return logits [C, V] and kept neurons [L, C] of the derived graph."""
    cache = KvCache(loaded.artifact.shape, "cpu", 64)
    prefill(sessions, loaded.artifact.shape, PROMPT, cache)
    inputs = {} if thresholds is None else {contract.THRESHOLDS: device_tensor(np.array(thresholds, np.float32), "cpu")}
    call: Call = bind_call(sessions.decode, cache, CONTINUATION, inputs)
    call.allocate(contract.KEPT_NEURONS, "cpu")
    outputs = call.run()
    return outputs[contract.LOGITS].numpy()[0], outputs[contract.KEPT_NEURONS].numpy()


@pytest.mark.parametrize("family", ["llama", "llama-biases", "qwen2"])
def test_neurons_below_the_threshold_are_dropped(family: str, tmp_path: Path) -> None:
    source = resolve_model(str(save_tiny_model(family, tmp_path / "model")))
    loaded = load(build_tiny(source, tmp_path / "artifact"), provider="cpu")
    expected, expected_kept, closest = truncated(source.reference(), source, THRESHOLDS)
    logits, kept = run_truncated(loaded, truncation_sessions(loaded.artifact, loaded.sessions), THRESHOLDS)
    assert expected_kept.min() > 0
    assert expected_kept.max() < source.spec.ffn_size
    assert closest > NEAR
    assert np.array_equal(kept, expected_kept.numpy())
    assert np.abs(logits - expected.numpy()).max() < LOGITS_TOLERANCE * float(expected.abs().max())


def test_without_thresholds_it_is_dense(model: Model) -> None:
    shape, sessions = model.artifact.shape, truncation_sessions(model.artifact, model.sessions)
    logits, kept = run_truncated(model, sessions, None)
    assert kept.tolist() == [[shape.ffn_size] * len(CONTINUATION)] * shape.num_layers
    cache = KvCache(shape, "cpu", 64)
    prefill(model.sessions, shape, PROMPT, cache)
    dense = decode(model.sessions, cache, CONTINUATION, None)
    assert np.abs(logits - dense).max() < LOGITS_TOLERANCE * np.abs(dense).max()


def test_a_threshold_above_every_magnitude_keeps_none(model: Model) -> None:
    sessions = truncation_sessions(model.artifact, model.sessions)
    logits, kept = run_truncated(model, sessions, [2.0] * 3)
    assert not kept.any()
    assert np.isfinite(logits).all()


def test_graph_has_the_inputs_and_outputs_of_the_contract(model: Model) -> None:
    session = truncation_sessions(model.artifact, model.sessions).decode
    inputs = truncation_inputs(model.artifact.shape)
    assert [node.name for node in session.get_inputs()] == [tensor.name for tensor in inputs if not tensor.default]
    assert [node.name for node in session.get_overridable_initializers()] == [contract.THRESHOLDS]
    outputs = truncation_outputs(model.artifact.shape)
    assert [(node.name, tuple(node.shape)) for node in session.get_outputs()] == [
        (tensor.name, tensor.axes) for tensor in outputs
    ]


def test_half_precision_has_the_functions_of_decode(model: Model) -> None:
    """A session of it would need CUDA."""
    proto = ir.to_proto(build_truncation(artifact_spec(model.artifact), weight_table(model.artifact), "float16"))
    assert {tensor.name for tensor in proto.graph.output} >= {contract.KEPT_NEURONS}
    assert {function.name for function in proto.functions} == {
        operators.ATTENTION,
        operators.LINEAR,
        operators.ADD_NORM,
        operators.ADD_BIAS_NORM,
    }


def test_it_derives_from_any_artifact(tiny_model: Path, tmp_path: Path) -> None:
    griffins = load(build_tiny(resolve_model(str(tiny_model)), tmp_path / "artifact", method=griffin(0.5)))
    _, kept = run_truncated(griffins, truncation_sessions(griffins.artifact, griffins.sessions), THRESHOLDS)
    assert 0 < kept.mean() < griffins.artifact.shape.ffn_size
