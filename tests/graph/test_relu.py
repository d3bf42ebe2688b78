"""ReLU: the down rows of zero activations are not read, and the result is the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tda_export.calibration.masked import Masking, two_level_ffn
from tda_export.evaluation.methods import Request, open_setting
from tda_export.graph import contract
from tda_export.graph.derive import counting_sessions
from tda_export.graph.reference import reference_logits
from tda_export.models.ffn_modules import FfnModules
from tda_export.models.source import ModelSource, resolve_model
from tda_export.runtime import Model, load
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import bind_call, decode, prefill
from tests.graph.test_parity import build_tiny
from tests.tiny import save_tiny_model

PROMPT, CONTINUATION = list(range(3, 40)), [40, 90, 17, 151, 33]
LAYERS, NEURONS = 3, 96


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSource, Model]:
    folder = tmp_path_factory.mktemp("opt")
    source = resolve_model(str(save_tiny_model("opt", folder / "model")))
    return source, load(build_tiny(source, folder / "artifact"), provider="cpu")


def active_neurons(source: ModelSource) -> np.ndarray:
    """Count the neurons with a nonzero activation in transformers, int64 [L, C]."""
    counts: list[torch.Tensor] = []
    model = source.reference()

    def count(h: torch.Tensor) -> None:
        counts.append((h[len(PROMPT) :] != 0).sum(dim=1))

    handles = [FfnModules(model, source.spec, layer).on_activations(count) for layer in range(LAYERS)]
    with torch.inference_mode():
        model(torch.tensor([PROMPT + CONTINUATION]))
    for handle in handles:
        handle.remove()
    return torch.stack(counts).numpy()


def test_only_active_neurons_are_counted_and_the_result_is_dense(opt: tuple[ModelSource, Model]) -> None:
    """With every neuron in the mask and a threshold of 0."""
    source, model = opt
    counting = counting_sessions(model.artifact, model.sessions)
    cache = KvCache(model.artifact.shape, "cpu", 64)
    prefill(counting, model.artifact.shape, PROMPT, cache)
    call = bind_call(counting.decode, cache, CONTINUATION)
    call.allocate(contract.KEPT_NEURONS, "cpu")
    outputs = call.run()
    counted = outputs[contract.KEPT_NEURONS].numpy()
    assert np.array_equal(counted, active_neurons(source))
    assert 0.3 < counted.mean() / NEURONS < 0.7
    _, dense = reference_logits(source.reference(), source.spec, PROMPT, CONTINUATION)
    np.testing.assert_allclose(outputs[contract.LOGITS].numpy()[0], dense.numpy(), atol=2e-4)


def test_native_kernel_and_function_body_agree_with_dense(opt: tuple[ModelSource, Model]) -> None:
    source, model = opt
    assert model.sessions.native
    cache = KvCache(model.artifact.shape, "cpu", 64)
    prefill(model.sessions, model.artifact.shape, PROMPT, cache)
    logits = np.concatenate([decode(model.sessions, cache, [token], None) for token in CONTINUATION])
    _, dense = reference_logits(source.reference(), source.spec, PROMPT, CONTINUATION)
    np.testing.assert_allclose(logits, dense.numpy(), atol=2e-4)


def test_calibration_counts_the_same_neurons(opt: tuple[ModelSource, Model]) -> None:
    source, _ = opt
    model, spec = source.reference(), source.spec
    found: dict[int, np.ndarray] = {}
    every = torch.ones(LAYERS, NEURONS)
    masking = Masking(every.bool(), torch.zeros(LAYERS, spec.hidden_size), every, torch.zeros(LAYERS))
    with (
        torch.no_grad(),
        two_level_ffn(model, spec, masking, lambda layer, run: found.update({layer: run.survivors.sum(1).numpy()})),
    ):
        model(torch.tensor([PROMPT + CONTINUATION]))
    counted = np.stack([found[layer][len(PROMPT) :] for layer in range(LAYERS)])
    assert np.array_equal(counted, active_neurons(source))


@pytest.mark.parametrize("asked", [Request("dense"), Request("griffin", sparsity=0.5)], ids=["dense", "griffin"])
def test_every_method_reads_no_rows_of_zeros(opt: tuple[ModelSource, Model], asked: Request) -> None:
    """eval counts the mask's up rows, and the down rows of its active neurons."""
    _, model = opt
    setting = open_setting(model.artifact, model.sessions, asked)
    cache = KvCache(model.artifact.shape, "cpu", 64)
    _, mask = setting.read(PROMPT, cache)
    density = setting.density(mask)
    counted = setting.decode_counted(cache, CONTINUATION, mask)
    assert counted.density == density == (1.0 if asked.method == "dense" else 0.5)
    assert density / 2 < counted.ffn_share < density  # some are active, some are not
    cache.truncate(len(PROMPT))
    np.testing.assert_allclose(counted.logits, setting.decode(cache, CONTINUATION, mask), atol=1e-5)
