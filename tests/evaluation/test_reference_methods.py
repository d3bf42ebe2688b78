"""The baselines in PyTorch: kept neurons, bytes, and dense results if all are kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pytest
import torch

from tda_export.calibration.capture import capture_activations
from tda_export.calibration.cett import neuron_scores, threshold_grid
from tda_export.calibration.curves import CurveAccumulator
from tda_export.errors import TdaError, UsageError
from tda_export.evaluation.methods import Request, open_setting
from tda_export.evaluation.reference_data import ffn_inputs, layer_activations
from tda_export.evaluation.reference_methods import (
    CatsMethod,
    Rows,
    StaticMethod,
    cats_threshold,
    measure_methods,
    sparse_ffn,
    static_method,
)
from tda_export.evaluation.text import TextSettings, evaluate_text
from tda_export.graph.reference import ACTIVATIONS
from tda_export.models.source import ModelSource, resolve_model
from tda_export.models.spec import Activation
from tda_export.runtime import Model
from tests.ffn_model import activate
from tests.tiny import save_tiny_model

LAYERS, NEURONS, HIDDEN = 3, 96, 64
SETTINGS = TextSettings(prompts=2, prompt_tokens=24, continuation_tokens=7)
TOKENS = torch.arange(3, 23)


@pytest.fixture(scope="module")
def windows() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(3, 200, SETTINGS.window).tolist() for _ in range(SETTINGS.prompts)]


def logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens[None]).logits[0]


def ffn(module: Any, x: torch.Tensor, neurons: list[list[int]]) -> torch.Tensor:
    """Return FFN(x) of tokens [T, M] with a list of neurons for each token, adding one neuron's vector at a time."""
    outputs = torch.zeros_like(x)
    for token, kept in enumerate(neurons):
        for i in kept:
            gate = module.gate_proj.weight[i] @ x[token]
            up = module.up_proj.weight[i] @ x[token]
            outputs[token] += gate * torch.sigmoid(gate) * up * module.down_proj.weight[:, i]
    return outputs


@dataclass(frozen=True)
class Fixed:
    """Always reads the same rows, which the test gives."""

    rows: Rows
    extra_bytes: int = 0

    def keep(self, layer: int, x: torch.Tensor, activated: torch.Tensor, up: torch.Tensor) -> Rows:
        assert x.shape == (len(activated), HIDDEN)
        assert activated.shape == up.shape == (len(x), NEURONS)
        return self.rows


def mask(count: int) -> torch.Tensor:
    return torch.arange(NEURONS) < count


@pytest.mark.parametrize(
    "method",
    [StaticMethod(torch.ones(LAYERS, NEURONS, dtype=torch.bool)), CatsMethod([0.0] * LAYERS)],
    ids=["static", "cats"],
)
@pytest.mark.parametrize("family", ["llama", "llama-biases", "qwen2"])
def test_keeping_every_neuron_is_dense_exactly(family: str, method: Any, tmp_path: Any) -> None:
    source = resolve_model(str(save_tiny_model(family, tmp_path / family)))
    reference = source.reference()
    dense = logits(reference)
    with sparse_ffn(reference, source.spec, method) as count:
        assert torch.equal(logits(reference), dense)
    assert count.shares == (1.0, 1.0, 1.0)
    assert torch.equal(logits(reference), dense)  # the model is unchanged


@pytest.mark.parametrize("activation", get_args(Activation))
def test_every_activation_of_a_spec_is_known(activation: Activation) -> None:
    x = np.linspace(-4, 4, 33)
    np.testing.assert_allclose(ACTIVATIONS[activation](torch.tensor(x)).numpy(), activate(activation, x), atol=1e-12)


def test_activated_times_up_is_what_the_model_multiplies_by_down(reference: Any, source: ModelSource) -> None:
    seen: dict[int, torch.Tensor] = {}

    class Recording(CatsMethod):
        def keep(self, layer: int, x: torch.Tensor, activated: torch.Tensor, up: torch.Tensor) -> Rows:
            seen[layer] = activated * up
            return super().keep(layer, x, activated, up)

    hs: dict[int, torch.Tensor] = {}
    with (
        capture_activations(reference, source.spec, lambda layer, h, down: hs.update({layer: h})),
        sparse_ffn(reference, source.spec, Recording([0.0] * LAYERS)),
    ):
        logits(reference)
    for layer in range(LAYERS):
        torch.testing.assert_close(seen[layer], hs[layer])


def test_rows_are_counted_by_matrix_and_dropped_neurons_add_nothing(reference: Any, source: ModelSource) -> None:
    with sparse_ffn(reference, source.spec, Fixed(Rows(mask(96), mask(48), mask(24)))) as count:
        sparse = logits(reference)
    assert count.shares == (1.0, 0.5, 0.25)
    assert count.ffn_share == pytest.approx((1.0 + 0.5 + 0.25) / 3)
    with sparse_ffn(reference, source.spec, Fixed(Rows(mask(24), mask(24), mask(24)))) as count:
        assert torch.equal(logits(reference), sparse)  # a neuron counts if all of its rows are read
    assert count.ffn_share == 0.25


def test_static_keeps_the_largest_scores_of_each_layer(reference: Any, source: ModelSource) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(LAYERS, NEURONS, generator=generator)
    method = static_method(scores, 0.75)
    best = [sorted(range(NEURONS), key=lambda i: -float(row[i]))[:24] for row in scores]
    assert [row.nonzero()[:, 0].tolist() for row in method.masks] == [sorted(chosen) for chosen in best]
    mlp, inputs = reference.model.layers[0].mlp, ffn_inputs(reference, source.spec, TOKENS[None])[0]
    with sparse_ffn(reference, source.spec, method) as count, torch.inference_mode():
        y = mlp(inputs[None])[0]
        expected = ffn(mlp, inputs, [best[0]] * len(inputs))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert count.shares == (0.25, 0.25, 0.25)


def test_cats_keeps_large_gates_and_reads_every_gate_row(reference: Any, source: ModelSource) -> None:
    mlp, inputs = reference.model.layers[0].mlp, ffn_inputs(reference, source.spec, TOKENS[None])[0]
    quantile = cats_threshold(layer_activations(reference, source.spec, 0, inputs).activated, 0.4)
    threshold = quantile * (1 - 1e-5)  # the quantile itself is one of the sizes, where rounding would decide
    kept: list[list[int]] = []
    for x in inputs:
        gates = (mlp.gate_proj.weight.detach() @ x).tolist()
        kept.append([i for i, gate in enumerate(gates) if abs(gate / (1 + math.exp(-gate))) >= threshold])
    with sparse_ffn(reference, source.spec, CatsMethod([threshold] * LAYERS)) as count, torch.inference_mode():
        y = mlp(inputs[None])[0]
        expected = ffn(mlp, inputs, kept)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    density = sum(map(len, kept)) / (NEURONS * len(inputs))
    assert count.shares == pytest.approx((1.0, density, density))
    assert density == pytest.approx(1 - 1.5 * 0.4, abs=1e-3)  # on the text that it was chosen on
    assert count.ffn_share == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize(("sparsity", "threshold"), [(0.0, 0.1), (1 / 3, 0.3), (0.5, 0.4), (2 / 3, math.inf)])
def test_cats_threshold_is_a_quantile_of_sizes(sparsity: float, threshold: float) -> None:
    assert cats_threshold(torch.tensor([[0.1, -0.4], [-0.2, 0.3]]), sparsity) == pytest.approx(threshold)


def test_cats_refuses_more_than_two_thirds() -> None:
    with pytest.raises(UsageError, match=r"saves at most 2/3 .* sparsity 0.7 is more. Give a sparsity up to 0.666"):
        cats_threshold(torch.ones(1, 4), 0.7)


def test_scores_of_the_inputs_are_the_priors_of_calibration(reference: Any, source: ModelSource) -> None:
    tokens = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(2))
    accumulator = CurveAccumulator(LAYERS, NEURONS, threshold_grid(), "prompt", 8)
    with torch.inference_mode(), capture_activations(reference, source.spec, accumulator.add):
        for sequence in tokens:
            reference.base_model(sequence[None], use_cache=False)
    done: list[int] = []
    inputs = ffn_inputs(reference, source.spec, tokens, done.append)
    assert done == [1, 1]
    for layer, x in enumerate(inputs):
        assert x.shape == (2 * 11, HIDDEN)  # without the first tokens
        scores = neuron_scores(layer_activations(reference, source.spec, layer, x).relative)
        torch.testing.assert_close(scores.double(), accumulator.sums.prior_scores[layer], rtol=1e-4, atol=1e-6)


def test_measures_by_the_protocol_of_eval(
    model: Model, reference: Any, source: ModelSource, windows: list[list[int]]
) -> None:
    """A static mask gives the same in the artifact's decode graph and here."""
    static = static_method(torch.rand(LAYERS, NEURONS, generator=torch.Generator().manual_seed(3)), 0.5)
    every = StaticMethod(torch.ones(LAYERS, NEURONS, dtype=torch.bool), extra_bytes=1000)
    results = measure_methods(reference, source.spec, windows, SETTINGS, {"half": static, "all": every})
    expected = evaluate_text(
        model.artifact, open_setting(model.artifact, model.sessions, Request("dense")), windows, SETTINGS
    )
    half, dense = results["half"], results["all"]
    assert dense.perplexity == dense.dense_perplexity == half.dense_perplexity
    assert dense.dense_perplexity == pytest.approx(expected.dense_perplexity, rel=1e-4)
    assert dense.dense_perplexity_stderr == pytest.approx(expected.dense_perplexity_stderr, rel=1e-3)
    assert (dense.kl, dense.agreement, dense.density) == (0.0, 1.0, 1.0)
    assert dense.dense_ffn_bytes == expected.dense_ffn_bytes
    assert dense.ffn_bytes == pytest.approx(dense.dense_ffn_bytes + 1000)
    assert half.ffn_bytes == pytest.approx(half.dense_ffn_bytes / 2)
    assert half.density == 0.5
    losses, kls = [], []
    for window in windows:  # the slow way: every context is read again for each token
        total, divergence = 0.0, 0.0
        with torch.inference_mode():
            cache = reference(torch.tensor([window[:24]]), use_cache=True).past_key_values
            exact = reference(torch.tensor([window[:-1]])).logits[0, 24:].log_softmax(-1)
            for token in range(7):
                with sparse_ffn(reference, source.spec, static):
                    step = reference(torch.tensor([window[24 + token : 25 + token]]), past_key_values=cache)
                sparse = step.logits[0, 0].log_softmax(-1)
                total -= float(sparse[window[25 + token]])
                divergence += float((exact[token].exp() * (exact[token] - sparse)).sum())
        losses.append(total / 7)
        kls.append(divergence / 7)
    assert half.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert half.kl == pytest.approx(np.mean(kls), rel=1e-3)


def test_windows_longer_than_the_model_are_refused(reference: Any, source: ModelSource) -> None:
    with pytest.raises(TdaError, match=r"more than the model's 512 positions. Shorten"):
        measure_methods(reference, source.spec, [], TextSettings(2, 512, 1), {})


@pytest.mark.parametrize("family", ["opt", "gpt-neox", "gpt2", "phi3"])
def test_ffns_without_separate_gates_are_refused(family: str, tmp_path: Any) -> None:
    source = resolve_model(str(save_tiny_model(family, tmp_path / "model")))
    message = rf"^{source.spec.architecture}: methods in PyTorch need an FFN with separate gate and up projections\. "
    with pytest.raises(TdaError, match=message):
        ffn_inputs(source.reference(), source.spec, torch.zeros(1, 4, dtype=torch.int64))
    with (
        pytest.raises(TdaError, match=message),
        sparse_ffn(source.reference(), source.spec, static_method(torch.ones(3, 96), 0.5)),
    ):
        pass
