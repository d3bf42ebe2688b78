"""Curves of a whole model against forward passes that the test takes apart; sums over sequences add up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tda_export.calibration.cett import threshold_grid
from tda_export.calibration.curves import CurveAccumulator, CurveSums, Estimator
from tda_export.calibration.run import CalibrationSettings, accumulate_curves
from tda_export.errors import TdaError
from tda_export.models.source import ModelSource, resolve_model
from tests.tiny import save_tiny_model

ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
SEQUENCES, PROMPT, CONTINUATION = 4, 10, 6
CHECKED_THRESHOLDS = 60  # of the 13,819, evenly spaced, both ends among them


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """A tiny model with an FFN output bias, which does not count for CETT."""
    return resolve_model(str(save_tiny_model("llama-biases", tmp_path_factory.mktemp("curves") / "model")))


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(3, 259, (SEQUENCES, PROMPT + CONTINUATION), generator=torch.Generator().manual_seed(1))


def settings_for(estimator: Estimator) -> CalibrationSettings:
    return CalibrationSettings(estimator=estimator, prompt_tokens=PROMPT, continuation_tokens=CONTINUATION)


@pytest.fixture(scope="module")
def accumulated(source: ModelSource, tokens: torch.Tensor) -> dict[Estimator, tuple[torch.Tensor, CurveSums]]:
    model = source.reference()
    return {e: accumulate_curves(model, source.spec, tokens, settings_for(e)) for e in ESTIMATORS}


# Against a reference


def neuron_outputs(model: Any, sequence: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Run one sequence. Yield h [P + C, F] and n [P + C, F, M] of each layer, float64, from the FFN's input."""
    inputs: list[torch.Tensor] = []
    handles = [
        layer.mlp.register_forward_pre_hook(lambda mlp, arguments: inputs.append(arguments[0][0].double()))
        for layer in model.model.layers
    ]
    model(sequence[None], use_cache=False)
    for handle in handles:
        handle.remove()
    for x, layer in zip(inputs, model.model.layers, strict=True):
        weight = {name: value.double() for name, value in layer.mlp.named_parameters()}
        gate = x @ weight["gate_proj.weight"].T + weight["gate_proj.bias"]
        up = x @ weight["up_proj.weight"].T + weight["up_proj.bias"]
        h = gate / (1 + torch.exp(-gate)) * up
        yield h, h[:, :, None] * weight["down_proj.weight"].T


def cett_sum(n: torch.Tensor, dropped: torch.Tensor) -> float:
    """Return the sum over tokens of || Σ dropped n_i(t) || / || Σ n_i(t) ||; n [T, F, M], dropped [T, F]."""
    total = 0.0
    for vectors, which in zip(n, dropped, strict=True):
        total += float(vectors[which].sum(dim=0).norm() / vectors.sum(dim=0).norm())
    return total


@pytest.fixture(scope="module")
def slow(source: ModelSource, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the fields of CurveSums by their definitions, at CHECKED_THRESHOLDS, with `ratio` for each estimator."""
    grid = threshold_grid().double()
    grid = grid[torch.linspace(0, len(grid) - 1, CHECKED_THRESHOLDS).long()]
    layers, neurons = source.spec.num_layers, source.spec.ffn_size
    sums = {
        name: torch.zeros(layers, CHECKED_THRESHOLDS, dtype=torch.float64)
        for name in ("prompt", "token", "density", "token_density")
    } | {name: torch.zeros(layers, neurons, dtype=torch.float64) for name in ("score_square", "activation")}
    with torch.inference_mode():
        for sequence in tokens:
            for layer, (h, n) in enumerate(neuron_outputs(source.reference(), sequence)):
                h, n = h[1:], n[1:]  # the first token does not count
                m = n.norm(dim=2)
                r = m / m.norm(dim=1, keepdim=True)
                s = (r[: PROMPT - 1] ** 2).mean(dim=0).sqrt()
                continuation = n[PROMPT - 1 :]
                for k, tau in enumerate(grid):
                    sums["prompt"][layer, k] += cett_sum(continuation, (s < tau).expand(CONTINUATION, -1))
                    sums["token"][layer, k] += cett_sum(n, r < tau)
                    sums["density"][layer, k] += (s >= tau).double().mean()
                    sums["token_density"][layer, k] += (r >= tau).double().mean(dim=1).sum()
                sums["score_square"][layer] += (r**2).sum(dim=0)
                sums["activation"][layer] += h.sum(dim=0)
    return sums


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_sums_are_those_of_the_definition(
    estimator: Estimator, accumulated: dict[Estimator, tuple[torch.Tensor, CurveSums]], slow: dict[str, torch.Tensor]
) -> None:
    grid, sums = accumulated[estimator]
    checked = torch.linspace(0, len(grid) - 1, CHECKED_THRESHOLDS).long()

    def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    assert torch.equal(grid, threshold_grid())
    same(sums.ratio[:, checked], slow[estimator])
    same(sums.density[:, checked], slow["density"])
    same(sums.score_square, slow["score_square"])
    same(sums.activation, slow["activation"])
    if estimator == "token":
        same(sums.token_density[:, checked], slow["token_density"])
    else:
        assert sums.token_density.shape == (3, 0)


@pytest.mark.parametrize(
    ("estimator", "per_sequence"), [("prompt", CONTINUATION), ("token", PROMPT + CONTINUATION - 1)]
)
def test_counts_and_means(
    estimator: Estimator, per_sequence: int, accumulated: dict[Estimator, tuple[torch.Tensor, CurveSums]]
) -> None:
    sums = accumulated[estimator][1]
    assert sums.sequences.tolist() == [SEQUENCES]
    assert sums.tokens.tolist() == [SEQUENCES * (PROMPT + CONTINUATION - 1)]
    assert sums.ratio_tokens.tolist() == [SEQUENCES * per_sequence] * 3
    one = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(sums.mean_cett[:, 0], 0 * one)
    torch.testing.assert_close(sums.mean_cett[:, -1], one)
    torch.testing.assert_close(sums.mean_density[:, 0], one)
    torch.testing.assert_close(sums.mean_density[:, -1], 0 * one)
    torch.testing.assert_close(sums.prior_scores.square().sum(dim=1), one, rtol=1e-6, atol=0)
    torch.testing.assert_close(sums.mean_activations, sums.activation / float(sums.tokens))
    assert all(getattr(sums, field.name).dtype == torch.float64 for field in fields(CurveSums))


# Sums that add


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("first_half", [1, 2])
def test_halves_merge_to_the_whole(
    estimator: Estimator,
    first_half: int,
    source: ModelSource,
    tokens: torch.Tensor,
    accumulated: dict[Estimator, tuple[torch.Tensor, CurveSums]],
) -> None:
    model, options = source.reference(), settings_for(estimator)
    _, left = accumulate_curves(model, source.spec, tokens[:first_half], options)
    _, right = accumulate_curves(model, source.spec, tokens[first_half:], options)
    for merged in (left.merge(right), right.merge(left)):
        for field in fields(CurveSums):
            torch.testing.assert_close(getattr(merged, field.name), getattr(accumulated[estimator][1], field.name))


def test_merging_leaves_both_halves_as_they_were(accumulated: dict[Estimator, tuple[torch.Tensor, CurveSums]]) -> None:
    sums = accumulated["prompt"][1]
    before = sums.ratio.clone()
    sums.merge(sums)
    assert torch.equal(sums.ratio, before)


def test_progress_advances_by_one_a_sequence(source: ModelSource, tokens: torch.Tensor) -> None:
    steps: list[int] = []
    accumulate_curves(source.reference(), source.spec, tokens[:2], settings_for("prompt"), steps.append)
    assert steps == [1, 1]


# Tokens that count


def add_one(estimator: Estimator, h: torch.Tensor, *, prompt: int) -> CurveSums:
    """Accumulate one layer of one sequence over neurons with outputs of equal length."""
    accumulator = CurveAccumulator(1, h.shape[1], threshold_grid(30), estimator, prompt)
    accumulator.add(0, h, torch.eye(h.shape[1]))  # W_down [M, F]
    return accumulator.sums


def changed_fields(before: CurveSums, after: CurveSums) -> set[str]:
    return {f.name for f in fields(CurveSums) if not torch.equal(getattr(before, f.name), getattr(after, f.name))}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@settings(deadline=None, max_examples=25)
@given(value=st.floats(-1e6, 1e6, width=32), prompt=st.integers(2, 6), seed=st.integers(0, 2**31 - 1))
def test_the_first_token_is_left_out(estimator: Estimator, value: float, prompt: int, seed: int) -> None:
    h = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))
    sink = h.clone()
    sink[0] = value
    assert changed_fields(add_one(estimator, h, prompt=prompt), add_one(estimator, sink, prompt=prompt)) == set()


@pytest.mark.parametrize("token", range(1, 8))
def test_the_mask_is_of_the_prompt_and_the_curve_of_the_continuation(token: int) -> None:
    prompt = 5
    h = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    other = h.clone()
    other[token] = torch.tensor([9.0, 0.0, 0.0, 0.0, 0.1])
    changed = changed_fields(add_one("prompt", h, prompt=prompt), add_one("prompt", other, prompt=prompt))
    assert changed >= {"ratio", "score_square", "activation"}
    assert ("density" in changed) == (token < prompt)


def test_a_continuation_that_needs_other_neurons_loses_everything() -> None:
    h = torch.zeros(6, 2)
    h[1:4, 0] = 1  # prompt: neuron 0
    h[4:, 1] = 1  # continuation: neuron 1
    sums = add_one("prompt", h, prompt=4)
    assert sums.ratio_tokens.tolist() == [2]
    assert sums.mean_cett[0].tolist() == [0.0] + [1.0] * 29
    assert sums.mean_density[0].tolist() == [1.0] + [0.5] * 28 + [0.0]
    per_token = add_one("token", h, prompt=4)  # each token keeps its neuron up to the last threshold
    assert per_token.ratio_tokens.tolist() == [5]
    assert per_token.mean_cett[0].tolist() == [0.0] * 29 + [1.0]


def test_a_continuation_without_output_is_left_out() -> None:
    h = torch.ones(6, 2)
    h[4] = 0
    sums = add_one("prompt", h, prompt=4)
    assert sums.ratio_tokens.tolist() == [1]
    assert float(sums.mean_cett[0, -1]) == 1
    h[4:] = 0
    assert add_one("prompt", h, prompt=4).mean_cett.isfinite().all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("token", [1, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_activations_that_are_not_finite_are_refused(
    estimator: Estimator, value: float, token: int, dtype: torch.dtype
) -> None:
    """Float16 overflows in some models, and their curves would mean nothing."""
    accumulator = CurveAccumulator(3, 5, threshold_grid(30), estimator, 4)
    h = torch.ones(8, 5, dtype=dtype)
    accumulator.add(1, h, torch.eye(5, dtype=dtype))
    before = [getattr(accumulator.sums, field.name).clone() for field in fields(CurveSums)]
    h[token, 2] = value
    message = r"^Layer 2: activations are not finite\. Calibrate with --dtype bf16 or fp32\.$"
    with pytest.raises(TdaError, match=message):
        accumulator.add(2, h, torch.eye(5, dtype=dtype))
    for field, sums in zip(fields(CurveSums), before, strict=True):
        assert torch.equal(getattr(accumulator.sums, field.name), sums)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_token_may_overflow(value: float) -> None:
    h = torch.ones(6, 3)
    h[0] = value
    assert changed_fields(add_one("prompt", torch.ones(6, 3), prompt=3), add_one("prompt", h, prompt=3)) == set()


def test_sequences_are_counted_once_not_for_every_layer() -> None:
    accumulator = CurveAccumulator(3, 2, threshold_grid(5), "prompt", 2)
    for layer in range(3):
        accumulator.add(layer, torch.ones(4, 2), torch.eye(2))
    assert accumulator.sums.sequences.tolist() == [1]
    assert accumulator.sums.tokens.tolist() == [3]
