"""Thresholds for densities, and prices against finite differences."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tda_export.calibration.dense import Blended
from tda_export.calibration.marginals import (
    LARGEST,
    SMALLEST,
    Densities,
    EstimateHistogram,
    Level,
    Neighbours,
    Prices,
    price,
    score_thresholds,
)
from tda_export.calibration.masked import LayerRun, choose_masking, masked_kl, two_level_ffn
from tda_export.ffn_share import GATED
from tests.calibration.kl_case import KlCase, make_case

CPU = torch.device("cpu")
BIN = 1.0103  # 18 decades in 4,094 steps


def random_estimates(seed: int, tokens: int, neurons: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    estimates = torch.exp(3 * torch.randn(tokens, neurons, generator=generator))
    estimates[torch.rand(tokens, neurons, generator=generator) < 0.05] = 0.0
    return estimates


def filled(estimates: torch.Tensor, keep: torch.Tensor) -> EstimateHistogram:
    histogram = EstimateHistogram(1, CPU)
    histogram.add(0, estimates, keep)
    return histogram


def surviving(estimates: torch.Tensor, keep: torch.Tensor, threshold: float) -> float:
    kept = sum(
        float(value) >= threshold for row in estimates for value, inside in zip(row, keep, strict=True) if inside
    )
    return kept / estimates.numel()


@given(
    seed=st.integers(0, 2**32),
    tokens=st.integers(1, 6),
    neurons=st.integers(1, 30),
    mask=st.floats(0, 1),
    density=st.floats(0, 1, width=32),
)
def test_a_token_threshold_reaches_its_density_within_a_bin(
    seed: int, tokens: int, neurons: int, mask: float, density: float
) -> None:
    estimates = random_estimates(seed, tokens, neurons)
    keep = torch.rand(neurons, generator=torch.Generator().manual_seed(seed)) < mask
    threshold = float(filled(estimates, keep).thresholds(torch.tensor([density]))[0])
    if surviving(estimates, keep, 0.0) < density:
        assert threshold == 0
    else:
        assert surviving(estimates, keep, threshold) >= density
        smaller = surviving(estimates, keep, max(threshold, SMALLEST) * BIN)
        assert smaller < density or threshold >= LARGEST / BIN


def test_token_thresholds_at_both_ends() -> None:
    estimates, keep = random_estimates(0, 4, 20), torch.ones(20, dtype=torch.bool)
    histogram = filled(estimates, keep)
    assert float(histogram.thresholds(torch.ones(1))[0]) == 0.0
    assert surviving(estimates, keep, float(histogram.thresholds(torch.zeros(1))[0])) == 0


def test_estimates_outside_the_edges_are_counted() -> None:
    estimates, keep = torch.tensor([[0.0, SMALLEST / 10, 1.0, LARGEST * 10]]), torch.ones(4, dtype=torch.bool)
    histogram = filled(estimates, keep)
    found = [float(histogram.thresholds(torch.tensor([share]))[0]) for share in (0.25, 0.5, 0.75, 1.0)]
    assert found[0] == pytest.approx(LARGEST)
    assert 1 / BIN <= found[1] <= 1.0
    assert found[2:] == [0.0, 0.0]


def test_an_empty_histogram_drops_nothing() -> None:
    assert EstimateHistogram(2, CPU).thresholds(torch.tensor([0.1, 0.9])).tolist() == [0.0, 0.0]


def test_layers_and_additions_stay_apart_and_add_up() -> None:
    first, second, other = random_estimates(0, 3, 20), random_estimates(1, 5, 20), random_estimates(2, 4, 20) * 1e3
    keep = torch.arange(20) % 3 > 0
    histogram = EstimateHistogram(2, CPU)
    histogram.add(0, first, keep)
    histogram.add(1, other, keep)
    histogram.add(0, second, ~keep)
    whole = torch.cat([first[:, keep].flatten(), second[:, ~keep].flatten()])
    wanted = len(whole) // 3
    density = (wanted - 0.5) / (first.numel() + second.numel())
    threshold = float(histogram.thresholds(torch.tensor([density, 0.2]))[0])
    exact = float(whole.sort(descending=True).values[wanted - 1])
    assert exact / BIN <= threshold <= exact


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_faded_estimates_count_less(weight: float) -> None:
    keep = torch.ones(10, dtype=torch.bool)
    histogram = filled(torch.full((3, 10), 1.0), keep)
    histogram.fade(weight)
    histogram.add(0, torch.full((2, 10), 100.0), keep)
    share = 20 / (20 + 30 * weight)  # the share of the larger ones
    assert float(histogram.thresholds(torch.tensor([share - 0.01]))[0]) == pytest.approx(100, rel=0.011)
    if weight:
        assert float(histogram.thresholds(torch.tensor([share + 0.01]))[0]) == pytest.approx(1, rel=0.011)


def random_blended(seed: int, prompts: int, neurons: int) -> list[Blended]:
    generator = torch.Generator().manual_seed(seed)
    return [Blended(torch.rand(2, neurons, generator=generator) ** 4, torch.zeros(2, neurons)) for _ in range(prompts)]


@given(
    seed=st.integers(0, 2**32), prompts=st.integers(1, 4), neurons=st.integers(1, 40), density=st.floats(0, 1, width=32)
)
def test_score_thresholds_reach_their_density_over_all_prompts(
    seed: int, prompts: int, neurons: int, density: float
) -> None:
    blended, other = random_blended(seed, prompts, neurons), 0.5
    thresholds = score_thresholds(blended, torch.tensor([density, other]))
    for layer, share in enumerate((density, other)):
        scores = [float(score) for one in blended for score in one.score_square[layer]]
        kept = sum(score >= float(thresholds[layer]) for score in scores)
        # At least the share and no neuron more, and never fewer than one.
        assert kept == max(1, math.ceil(share * len(scores) - 1e-9))


def test_score_thresholds_at_both_ends() -> None:
    blended = random_blended(0, 3, 10)
    all_of_them, one = score_thresholds(blended, torch.tensor([1.0, 0.0])).tolist()
    assert all_of_them == 0.0
    assert one == max(float(prompt.score_square[1].max()) for prompt in blended)


def test_the_ffn_share_counts_three_equal_matrices() -> None:
    assert Densities(torch.tensor([0.9, 0.5]), torch.tensor([0.3, 0.5])).ffn_share(GATED) == pytest.approx(0.5)


def ranked(case: KlCase) -> list[Blended]:
    """Give neurons scores 0, 1, 2, … in a random order, so that masks are easy to name. Means stay correct."""
    generator = torch.Generator().manual_seed(3)
    layers, neurons = case.spec.num_layers, case.spec.ffn_size
    order = torch.stack([torch.randperm(neurons, generator=generator) for _ in range(layers)])
    return [Blended(order.float(), one.mean_activation) for one in case.blended]


def kl_at(case: KlCase, blended: list[Blended], level: Level) -> float:
    total = 0.0
    for sequence, statistics in zip(case.sequences, blended, strict=True):
        masking = choose_masking(case.down, statistics, level.score_square, level.token, case.scale)
        with torch.no_grad(), two_level_ffn(case.model, case.spec, masking):
            total += float(masked_kl(case.model, sequence))
    return total / len(case.sequences)


def prices_at(case: KlCase, blended: list[Blended], level: Level, neighbours: Neighbours) -> Prices:
    histogram = EstimateHistogram(case.spec.num_layers, CPU)
    found = price(case.model, case.spec, case.sequences, blended, level, neighbours, case.scale, case.down, histogram)
    return found


def in_layer(level: Level, layer: int, **changes: float) -> Level:
    tensors = {name: getattr(level, name).clone() for name in ("score_square", "token")}
    for name, value in changes.items():
        tensors[name][layer] = value
    return Level(**tensors)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("rank", [20, 60])
def test_mask_prices_are_the_slope_of_the_divergence(kl_case: KlCase, layer: int, rank: int) -> None:
    """The mean of both ends' slopes is exact to second order, so a band of a few neurons is still well predicted."""
    blended, neurons = ranked(kl_case), kl_case.spec.ffn_size
    lower = Level(torch.full((3,), float(rank)), torch.zeros(3))
    upper = in_layer(lower, layer, score_square=rank + 3.0)
    size = 3 / neurons  # all three matrices: no token skips any
    predicted = [
        float(prices_at(kl_case, blended, level, Neighbours(lower, upper)).mask[layer]) * size
        for level in (lower, upper)
    ]
    measured = kl_at(kl_case, blended, upper) - kl_at(kl_case, blended, lower)
    assert abs(measured) > 1e-4
    assert sum(predicted) / 2 == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_token_prices_are_the_slope_of_the_divergence(kl_case: KlCase, layer: int) -> None:
    blended, neurons = ranked(kl_case), kl_case.spec.ffn_size
    estimates: list[torch.Tensor] = []
    start = Level(torch.full((3,), 30.0), torch.zeros(3))
    for sequence, statistics in zip(kl_case.sequences, blended, strict=True):
        masking = choose_masking(kl_case.down, statistics, start.score_square, start.token, kl_case.scale)

        def observe(number: int, run: LayerRun, keep: torch.Tensor = masking.keep) -> None:
            if number == layer:
                estimates.append(run.estimates[:, keep[layer]])

        with torch.no_grad(), two_level_ffn(kl_case.model, kl_case.spec, masking, observe):
            masked_kl(kl_case.model, sequence)
    seen = torch.cat(estimates)  # [tokens, neurons of the mask]; a layer's own thresholds do not change them
    low, high = seen.flatten().quantile(torch.tensor([0.6, 0.66])).tolist()
    lower, upper = in_layer(start, layer, token=low), in_layer(start, layer, token=high)
    size = 2 * float(((seen >= low) & (seen < high)).sum()) / (3 * len(seen) * neurons)
    predicted = [
        float(prices_at(kl_case, blended, level, Neighbours(lower, upper)).token[layer]) * size
        for level in (lower, upper)
    ]
    measured = kl_at(kl_case, blended, upper) - kl_at(kl_case, blended, lower)
    assert abs(measured) > 1e-4
    assert sum(predicted) / 2 == pytest.approx(measured, rel=0.15)


def test_prices_count_the_bytes_that_a_band_reads(kl_case: KlCase) -> None:
    """Check both prices, by band and token, with token thresholds that skip some of the mask's neurons."""
    blended = ranked(kl_case)
    level = Level(torch.full((3,), 40.0), torch.full((3,), 0.1))
    neighbours = Neighbours(
        Level(torch.full((3,), 35.0), torch.full((3,), 0.08)), Level(torch.full((3,), 46.0), torch.full((3,), 0.12))
    )
    found = prices_at(kl_case, blended, level, neighbours)
    cost, size = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    for sequence, statistics in zip(kl_case.sequences, blended, strict=True):
        masking = choose_masking(kl_case.down, statistics, level.score_square, level.token, kl_case.scale)
        runs: dict[int, LayerRun] = {}
        with two_level_ffn(kl_case.model, kl_case.spec, masking, runs.__setitem__):
            masked_kl(kl_case.model, sequence).backward()
        for layer, run in runs.items():
            assert run.used.grad is not None
            tokens, neurons = run.h.shape
            for neuron in range(neurons):
                in_mask_band = 35 <= float(statistics.score_square[layer, neuron]) < 46
                size[0, layer] += in_mask_band / (3 * neurons)  # its gate row, for every token
                for token in range(tokens):
                    slope, h = float(run.used.grad[0, token, neuron]), float(run.h[token, neuron])
                    estimate = float(run.estimates[token, neuron])
                    if in_mask_band:
                        used = h if estimate >= 0.1 else 0.0
                        cost[0, layer] -= slope * (used - float(statistics.mean_activation[layer, neuron]))
                        size[0, layer] += 2 * (estimate >= 0.1) / (3 * neurons * tokens)
                    if masking.keep[layer, neuron] and 0.08 <= estimate < 0.12:
                        cost[1, layer] -= slope * h
                        size[1, layer] += 2 / (3 * neurons * tokens)
    torch.testing.assert_close(torch.stack([found.mask, found.token]).double(), cost / size, rtol=1e-3, atol=1e-5)


def test_pricing_measures_divergence_densities_and_estimates(kl_case: KlCase) -> None:
    blended = ranked(kl_case)
    level = Level(torch.tensor([24.0, 48.0, 72.0]), torch.tensor([0.0, 0.1, 1e9]))
    histogram = EstimateHistogram(3, CPU)
    neighbours = Neighbours(level, level)
    found = price(
        kl_case.model,
        kl_case.spec,
        kl_case.sequences,
        blended,
        level,
        neighbours,
        kl_case.scale,
        kl_case.down,
        histogram,
    )
    assert found.kl == pytest.approx(kl_at(kl_case, blended, level), rel=1e-4)
    torch.testing.assert_close(found.densities.mask, torch.tensor([0.75, 0.5, 0.25]))
    token = found.densities.token.tolist()
    assert token[0] == pytest.approx(0.75)
    assert 0 < token[1] < 0.5
    assert token[2] == 0
    number = sum(len(sequence.log_probs) for sequence in kl_case.sequences)
    assert histogram.counts.sum(dim=1).tolist() == pytest.approx([share * number * 96 for share in (0.75, 0.5, 0.25)])
    assert histogram.total.tolist() == [number * 96] * 3


def test_an_empty_band_has_no_price(kl_case: KlCase) -> None:
    blended = ranked(kl_case)
    level = Level(torch.full((3,), 40.0), torch.full((3,), 0.1))
    found = prices_at(kl_case, blended, level, Neighbours(level, in_layer(level, 1, score_square=44.0)))
    assert found.mask.isnan().tolist() == [True, False, True]
    assert found.token.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prices_of_half_precision_models(kl_case: KlCase, tmp_path: Path, dtype: torch.dtype) -> None:
    case = make_case(tmp_path, dtype=dtype)
    blended = ranked(kl_case)
    level = Level(torch.full((3,), 30.0), torch.full((3,), 0.05))
    neighbours = Neighbours(
        Level(torch.full((3,), 10.0), torch.full((3,), 0.01)), Level(torch.full((3,), 50.0), torch.full((3,), 0.2))
    )
    expected = prices_at(kl_case, blended, level, neighbours)
    found = prices_at(case, blended, level, neighbours)
    size = float(torch.stack([expected.mask, expected.token]).abs().max())
    torch.testing.assert_close(found.mask, expected.mask, rtol=0.05, atol=0.1 * size)
    torch.testing.assert_close(found.token, expected.token, rtol=0.05, atol=0.1 * size)


def test_small_gradients_survive_float16(tmp_path: Path) -> None:
    """The weights are so small that gradients of activations underflow float16 unless the loss is scaled."""
    case = make_case(tmp_path, dtype=torch.float16)
    full = make_case(tmp_path)
    for one in (full, case):
        for weight in (*one.down, one.model.lm_head.weight):
            weight *= 2.0**-10
    blended = ranked(full)
    level = Level(torch.full((3,), 48.0), torch.zeros(3))
    neighbours = Neighbours(Level(torch.zeros(3), torch.zeros(3)), Level(torch.full((3,), 96.0), torch.zeros(3)))
    expected, found = (prices_at(one, blended, level, neighbours).mask for one in (full, case))
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))
