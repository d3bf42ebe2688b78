"""The fast computation of curves against loops that follow the definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tda_export.calibration.cett import (
    BLOCK_NEURONS,
    GRID_POINTS,
    GRID_SMALLEST,
    grid_bins,
    kept_share,
    neuron_scores,
    relative_magnitudes,
    tail_norms,
    tail_ratio_sums_by_neuron,
    tail_ratio_sums_by_token,
    threshold_grid,
)

RELATIVE_TOLERANCE = 1e-5  # float32 sums against float64 ones

seeds = st.integers(0, 2**31 - 1)
points_of_grid = st.integers(4, 24)
sizes = st.tuples(st.integers(1, 5), st.integers(1, 12), st.integers(4, 8))  # T, F, M


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_layer(size: tuple[int, int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw h [T, F] with a third of its activations and a third of its tokens zero, and W_down [F, M]."""
    tokens, neurons, hidden = size
    generator = generator_of(seed)
    h = torch.randn(tokens, neurons, generator=generator)
    h[torch.rand(tokens, neurons, generator=generator) < 1 / 3] = 0
    h[torch.rand(tokens, generator=generator) < 1 / 3] = 0
    return h, torch.randn(neurons, hidden, generator=generator)


def random_scores(shape: tuple[int, ...], grid: torch.Tensor, seed: int) -> torch.Tensor:
    """Draw scores in [0, 1] of which some are zero, some lie exactly on a grid threshold, and some are equal."""
    generator = generator_of(seed)
    count = math.prod(shape)
    thresholds = grid[:-1]  # no score reaches the closing threshold 2
    on_grid = thresholds[torch.randint(len(thresholds), (count,), generator=generator)]
    free = 10 ** (-7 * torch.rand(count, generator=generator))
    scores = torch.where(torch.rand(count, generator=generator) < 0.5, on_grid, free)
    copied = scores[torch.randint(count, (count,), generator=generator)]
    return torch.where(torch.rand(count, generator=generator) < 0.3, copied, scores).reshape(shape)


def slow_tail_ratio_sums(
    h: torch.Tensor, down: torch.Tensor, scores: torch.Tensor, grid: torch.Tensor
) -> tuple[list[float], int]:
    """For each threshold, and each token with an output: drop {i: s_i < tau}, sum the vectors, divide the norms.

    `scores` [T, F]: a row for each token; tokens that share a mask have equal rows.
    """

    def norm(token: int, neurons: list[int]) -> float:
        total = [0.0] * down.shape[1]
        for i in neurons:
            total = [t + float(h[token, i]) * float(w) for t, w in zip(total, down[i], strict=True)]
        return math.sqrt(sum(t * t for t in total))

    everyone = list(range(h.shape[1]))
    outputs = [norm(token, everyone) for token in range(h.shape[0])]
    sums = []
    for tau in grid.tolist():
        ratio = 0.0
        for token, output in enumerate(outputs):
            if output > 0:
                ratio += norm(token, [i for i in everyone if float(scores[token, i]) < tau]) / output
        sums.append(ratio)
    return sums, sum(output > 0 for output in outputs)


def slow_tail_norms(h: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Add one neuron's vector after another, and take the norm after each. Returns float64 [F + 1, T]."""
    tail = torch.zeros(h.shape[0], down.shape[1], dtype=torch.float64)  # [T, M]
    norms = [tail.norm(dim=1)]
    for i in range(h.shape[1]):
        tail = tail + h[:, i, None].double() * down[i].double()
        norms.append(tail.norm(dim=1))
    return torch.stack(norms)


def assert_same_curve(fast: tuple[torch.Tensor, int], slow: tuple[list[float], int]) -> None:
    assert fast[1] == slow[1]
    assert fast[0].dtype == torch.float64
    assert fast[0].tolist() == pytest.approx(slow[0], rel=RELATIVE_TOLERANCE, abs=1e-12)


# The grid


@pytest.mark.parametrize("points", [4, 5, 100, GRID_POINTS])
def test_grid_is_closed_and_ascends(points: int) -> None:
    grid = threshold_grid(points)
    assert grid.shape == (points,)
    assert grid.dtype == torch.float32
    assert bool((grid[1:] > grid[:-1]).all())
    assert grid[0] == 0
    assert float(grid[1]) == pytest.approx(GRID_SMALLEST, rel=1e-6)
    assert grid[-2] == 1
    assert grid[-1] == 2


def test_default_grid_steps_are_at_most_0_11_percent() -> None:
    inner = threshold_grid()[1:-1].double()
    steps = inner[1:] / inner[:-1] - 1
    assert float(steps.max()) <= 0.0011
    assert float(steps.min()) >= 0.0009  # logarithmic, so that no points are wasted


# Scores


@settings(deadline=None)
@given(size=sizes, seed=seeds)
def test_squares_of_relative_magnitudes_sum_to_one(size: tuple[int, int, int], seed: int) -> None:
    h, down = random_layer(size, seed)
    relative = relative_magnitudes(h, down.norm(dim=1))
    for row, activations in zip(relative.double(), h, strict=True):
        expected = 1.0 if bool(activations.any()) else 0.0
        assert float(row.square().sum()) == pytest.approx(expected, abs=1e-6)


@settings(deadline=None)
@given(size=sizes, seed=seeds)
def test_relative_magnitudes_are_those_of_the_definition(size: tuple[int, int, int], seed: int) -> None:
    h, down = random_layer(size, seed)
    relative = relative_magnitudes(h, down.norm(dim=1))
    for token in range(size[0]):
        vectors = h[token, :, None].double() * down.double()  # n_i(t) [F, M]
        lengths = [math.sqrt(sum(float(v) ** 2 for v in vector)) for vector in vectors]
        total = math.sqrt(sum(length**2 for length in lengths)) or 1.0
        assert relative[token].tolist() == pytest.approx([length / total for length in lengths], rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-21, 1e-10, 1e10, 1e21, 1e30])
def test_relative_magnitudes_do_not_depend_on_scale(scale: float) -> None:
    h, norms = torch.tensor([[3.0, -4.0, 0.0]]), torch.ones(3)
    assert relative_magnitudes(h * scale, norms)[0].tolist() == pytest.approx([0.6, 0.8, 0.0], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_relative_magnitudes_of_half_precision_are_computed_in_float32(dtype: torch.dtype) -> None:
    h = torch.tensor([[300.0, 400.0, 0.0]], dtype=dtype)  # squared, it overflows float16
    relative = relative_magnitudes(h, torch.ones(3))
    assert relative.dtype == torch.float32
    assert relative[0].tolist() == pytest.approx([0.6, 0.8, 0.0], rel=1e-6)


@settings(deadline=None)
@given(size=sizes, seed=seeds, times=st.integers(2, 4))
def test_scores_do_not_depend_on_prompt_length(size: tuple[int, int, int], seed: int, times: int) -> None:
    h, down = random_layer(size, seed)
    relative = relative_magnitudes(h, down.norm(dim=1))
    torch.testing.assert_close(neuron_scores(relative.repeat(times, 1)), neuron_scores(relative))


@settings(deadline=None)
@given(size=sizes, seed=seeds)
def test_scores_are_root_mean_squares(size: tuple[int, int, int], seed: int) -> None:
    h, down = random_layer(size, seed)
    relative = relative_magnitudes(h, down.norm(dim=1))
    slow = [math.sqrt(sum(float(r) ** 2 for r in column) / len(column)) for column in relative.T]
    assert neuron_scores(relative).tolist() == pytest.approx(slow, rel=1e-5, abs=1e-12)


# Bins and density


@settings(deadline=None)
@given(count=st.integers(1, 40), points=points_of_grid, seed=seeds)
def test_bins_count_the_thresholds_that_are_reached(count: int, points: int, seed: int) -> None:
    grid = threshold_grid(points)
    scores = random_scores((count,), grid, seed)
    slow = [sum(score >= tau for tau in grid.tolist()) for score in scores.tolist()]
    assert grid_bins(scores, grid).tolist() == slow


@settings(deadline=None)
@given(shape=st.tuples(st.integers(1, 4), st.integers(1, 12)), points=points_of_grid, seed=seeds)
def test_kept_share_is_the_share_of_scores_that_reach(shape: tuple[int, int], points: int, seed: int) -> None:
    grid = threshold_grid(points)
    scores = random_scores(shape, grid, seed)
    share = kept_share(grid_bins(scores, grid), points)
    flat = scores.reshape(-1).tolist()
    assert share.tolist() == pytest.approx([sum(s >= tau for s in flat) / len(flat) for tau in grid.tolist()])
    assert share[0] == 1
    assert share[-1] == 0


def test_bins_of_a_strided_view_are_those_of_its_values() -> None:
    grid = threshold_grid(20)
    scores = random_scores((6, 4), grid, seed=0)
    assert torch.equal(grid_bins(scores.T, grid), grid_bins(scores.T.clone(), grid))


# Tails

# Around the boundaries of one and of two blocks, and below.
around_blocks = st.integers(1, 12) | st.sampled_from([BLOCK_NEURONS * b + d for b in (1, 2) for d in (-1, 0, 1)])


def test_blocks_are_of_64_neurons() -> None:
    assert BLOCK_NEURONS == 64


@settings(deadline=None, max_examples=60)
@given(tokens=st.integers(1, 4), neurons=around_blocks, hidden=st.integers(4, 8), seed=seeds)
@example(tokens=2, neurons=1, hidden=4, seed=0)
@example(tokens=2, neurons=63, hidden=4, seed=0)
@example(tokens=2, neurons=64, hidden=4, seed=0)
@example(tokens=2, neurons=65, hidden=4, seed=0)
@example(tokens=2, neurons=128, hidden=4, seed=0)
@example(tokens=2, neurons=129, hidden=4, seed=0)
def test_tail_norms_are_those_of_adding_one_by_one(tokens: int, neurons: int, hidden: int, seed: int) -> None:
    h, down = random_layer((tokens, neurons, hidden), seed)
    fast, slow = tail_norms(h, down), slow_tail_norms(h, down)
    assert fast.dtype == torch.float64
    assert fast.shape == (neurons + 1, tokens)
    assert bool((fast[0] == 0).all())
    # Differences of squares lose half of the digits where a tail nearly cancels.
    largest = float(slow.max()) or 1.0
    torch.testing.assert_close(fast.square() / largest**2, slow.square() / largest**2, rtol=0, atol=1e-12)
    torch.testing.assert_close(fast[-1], slow[-1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("neurons", [2, BLOCK_NEURONS - 2, BLOCK_NEURONS, BLOCK_NEURONS + 2, 2 * BLOCK_NEURONS])
def test_tails_that_cancel_are_zero_and_never_nan(neurons: int) -> None:
    """Every second neuron cancels the one before it."""
    vectors = torch.randn(neurons // 2, 5, generator=generator_of(0))
    down = torch.stack([vectors, -vectors], dim=1).reshape(neurons, 5)  # [F, M]
    norms = tail_norms(torch.full((3, neurons), 7.0), down)
    assert bool(norms.isfinite().all())
    assert float(norms[2::2].max()) <= 1e-7 * float(norms.max())
    assert float(norms[-1].max()) <= 1e-14 * float(norms.max())
    assert bool((norms[1::2] > 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tail_norms_are_of_float64_whatever_comes(dtype: torch.dtype) -> None:
    h, down = random_layer((3, BLOCK_NEURONS + 1, 4), seed=1)
    h, down = (100 * h).to(dtype), (100 * down).to(dtype)  # the squares overflow float16
    torch.testing.assert_close(tail_norms(h, down), slow_tail_norms(h, down), rtol=1e-9, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(tokens=st.integers(1, 4), neurons=around_blocks, points=points_of_grid, seed=seeds)
@example(tokens=3, neurons=64, points=24, seed=0)
@example(tokens=3, neurons=65, points=24, seed=0)
@example(tokens=3, neurons=129, points=24, seed=0)
def test_curve_by_neuron_is_exact_across_blocks(tokens: int, neurons: int, points: int, seed: int) -> None:
    h, down = random_layer((tokens, neurons, 6), seed)
    grid = threshold_grid(points)
    scores = random_scores((neurons,), grid, seed + 1)
    sums, count = tail_ratio_sums_by_neuron(h, down, grid_bins(scores, grid), points)
    used = h.any(dim=1)
    vectors = h[used, :, None].double() * down.double()  # [T, F, M]
    outputs = vectors.sum(dim=1).norm(dim=1)
    slow = torch.stack([(vectors[:, scores < tau].sum(dim=1).norm(dim=1) / outputs).sum() for tau in grid])  # [K]
    assert count == int(used.sum())
    assert float((sums - slow).abs().max()) <= 1e-9 * max(float(slow.max()), 1.0)


# Curves


@settings(deadline=None, max_examples=60)
@given(size=sizes, points=points_of_grid, seed=seeds)
@example(size=(1, 1, 4), points=4, seed=0)
def test_curve_by_neuron_is_that_of_the_definition(size: tuple[int, int, int], points: int, seed: int) -> None:
    h, down = random_layer(size, seed)
    grid = threshold_grid(points)
    scores = random_scores((size[1],), grid, seed + 1)
    fast = tail_ratio_sums_by_neuron(h, down, grid_bins(scores, grid), points)
    assert_same_curve(fast, slow_tail_ratio_sums(h, down, scores.expand(size[0], -1), grid))


@settings(deadline=None, max_examples=60)
@given(size=sizes, points=points_of_grid, seed=seeds)
@example(size=(1, 1, 4), points=4, seed=0)
def test_curve_by_token_is_that_of_the_definition(size: tuple[int, int, int], points: int, seed: int) -> None:
    h, down = random_layer(size, seed)
    grid = threshold_grid(points)
    scores = random_scores(size[:2], grid, seed + 1)
    fast = tail_ratio_sums_by_token(h, down, grid_bins(scores, grid), points)
    assert_same_curve(fast, slow_tail_ratio_sums(h, down, scores, grid))


@settings(deadline=None, max_examples=30)
@given(size=sizes, points=points_of_grid, seed=seeds)
def test_estimators_agree_where_all_tokens_share_a_mask(size: tuple[int, int, int], points: int, seed: int) -> None:
    h, down = random_layer(size, seed)
    grid = threshold_grid(points)
    bins = grid_bins(random_scores((size[1],), grid, seed + 1), grid)
    by_neuron = tail_ratio_sums_by_neuron(h, down, bins, points)
    by_token = tail_ratio_sums_by_token(h, down, bins.expand(size[0], -1), points)
    assert by_neuron[1] == by_token[1]
    torch.testing.assert_close(by_neuron[0], by_token[0], rtol=RELATIVE_TOLERANCE, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(size=sizes, points=points_of_grid, seed=seeds)
def test_curve_runs_from_nothing_dropped_to_everything(size: tuple[int, int, int], points: int, seed: int) -> None:
    h, down = random_layer(size, seed)
    grid = threshold_grid(points)
    relative = relative_magnitudes(h, down.norm(dim=1))
    by_neuron = grid_bins(neuron_scores(relative), grid)
    by_token = grid_bins(relative, grid)
    for bins, (sums, count) in (
        (by_neuron, tail_ratio_sums_by_neuron(h, down, by_neuron, points)),
        (by_token, tail_ratio_sums_by_token(h, down, by_token, points)),
    ):
        assert sums[0] == 0
        assert kept_share(bins, points)[0] == 1
        assert float(sums[-1]) == pytest.approx(count)
        assert kept_share(bins, points)[-1] == 0


def test_curve_may_fall_where_dropped_vectors_cancel() -> None:
    down = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]])
    grid = torch.tensor([0.0, 0.1, 0.2, 0.3, 2.0])
    bins = grid_bins(torch.tensor([0.05, 0.15, 0.9]), grid)
    sums, count = tail_ratio_sums_by_neuron(torch.ones(1, 3), down, bins, len(grid))
    assert count == 1
    assert sums.tolist() == [0.0, 0.5, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("tokens", [0, 3])
def test_a_layer_without_output_has_no_curve(tokens: int) -> None:
    h, down, points = torch.zeros(tokens, 2), torch.ones(2, 4), 5
    bins = torch.tensor([1, 2])
    for sums, count in (
        tail_ratio_sums_by_neuron(h, down, bins, points),
        tail_ratio_sums_by_token(h, down, bins.expand(tokens, -1), points),
    ):
        assert count == 0
        assert sums.tolist() == [0.0] * points
