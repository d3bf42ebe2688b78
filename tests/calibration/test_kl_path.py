"""The sweep: its budget, the changes of densities, and interruptions."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tda_export.calibration.kl_path import (
    FIRST_SHARE,
    LAST_SHARE,
    MEMORY,
    SMALLEST_DENSITY,
    STEPS,
    WARM_UP,
    WIDEST,
    PathSearch,
    PathState,
    collect_estimates,
    densities_at,
    move,
    remember,
    scale_to,
    share_of_step,
)
from tda_export.calibration.marginals import Densities, EstimateHistogram, Level, score_thresholds
from tda_export.ffn_share import GATED
from tests.calibration.kl_case import KlCase, with_down_scaled

SHARE = st.floats(0.01, 1.0)


@st.composite
def any_densities(draw: st.DrawFn) -> Densities:
    layers = draw(st.integers(1, 6))
    numbers = st.lists(st.floats(SMALLEST_DENSITY, 1.0), min_size=layers, max_size=layers)
    mask = torch.tensor(draw(numbers))
    return Densities(mask, torch.minimum(torch.tensor(draw(numbers)), mask))


def check_bounds(densities: Densities) -> None:
    assert (densities.mask <= 1).all()
    assert (densities.token <= densities.mask).all()
    assert (densities.token >= SMALLEST_DENSITY - 1e-9).all()


def test_shares_of_steps_fall_evenly_from_first_to_last() -> None:
    shares = [share_of_step(step) for step in range(WARM_UP + STEPS)]
    assert shares[: WARM_UP + 1] == [FIRST_SHARE] * (WARM_UP + 1)
    assert shares[-1] == pytest.approx(LAST_SHARE)
    ratios = [after / before for before, after in zip(shares[WARM_UP:], shares[WARM_UP + 1 :], strict=False)]
    assert ratios == pytest.approx([(LAST_SHARE / FIRST_SHARE) ** (1 / (STEPS - 1))] * (STEPS - 1))


@given(densities=any_densities(), share=SHARE)
def test_scaling_hits_the_budget_within_bounds(densities: Densities, share: float) -> None:
    scaled = scale_to(densities, share, GATED)
    assert scaled.ffn_share(GATED) == pytest.approx(share, abs=1e-5)
    check_bounds(scaled)


@given(densities=any_densities(), share=SHARE)
def test_scaling_keeps_the_order_of_layers(densities: Densities, share: float) -> None:
    scaled = scale_to(densities, share, GATED)
    for name in ("mask", "token"):
        order = getattr(densities, name).argsort()
        assert (getattr(scaled, name)[order].diff() >= -1e-6).all()


def test_scaling_at_both_ends() -> None:
    densities = Densities(torch.tensor([0.5, 0.01]), torch.tensor([0.2, 0.005]))
    dense = scale_to(densities, 1.0, GATED)
    assert dense.mask.tolist() == dense.token.tolist() == [1.0, 1.0]
    sparse = scale_to(densities, SMALLEST_DENSITY / 10, GATED)  # unreachable: as sparse as bounds allow
    assert sparse.mask.tolist() == sparse.token.tolist() == pytest.approx([SMALLEST_DENSITY] * 2)


@given(densities=any_densities(), share=SHARE, data=st.data())
def test_moving_hits_the_budget_whatever_the_prices(densities: Densities, share: float, data: st.DataObject) -> None:
    layers = len(densities.mask)
    row = st.lists(st.floats(-1e6, 1e6, width=32), min_size=layers, max_size=layers)
    moved = move(densities, torch.tensor([data.draw(row), data.draw(row)]), share, GATED)
    assert moved.ffn_share(GATED) == pytest.approx(share, abs=1e-5)
    check_bounds(moved)


@given(low=st.floats(0.01, 10), ratio=st.floats(1.5, 4), share=st.floats(0.1, 0.6))
def test_a_higher_price_gets_more_density(low: float, ratio: float, share: float) -> None:
    """Equal layers, of which the last has a higher price."""
    alike = Densities(torch.full((4,), 0.6), torch.full((4,), 0.5))
    prices = torch.full((2, 4), low)
    prices[:, 3] *= ratio
    moved = move(alike, prices, share, GATED)
    for density in (moved.mask, moved.token):
        assert density[3] > density[0]
        assert density[:3].tolist() == pytest.approx([float(density[0])] * 3)


def test_equal_prices_move_nothing() -> None:
    densities = scale_to(Densities(torch.tensor([0.9, 0.3]), torch.tensor([0.4, 0.2])), 0.4, GATED)
    moved = move(densities, torch.full((2, 2), 7.0), 0.4, GATED)
    torch.testing.assert_close(moved.mask, densities.mask)
    torch.testing.assert_close(moved.token, densities.token)


def test_one_extreme_price_counts_as_the_widest() -> None:
    densities = Densities(torch.full((3,), 0.5), torch.full((3,), 0.4))
    moved = [
        move(densities, torch.tensor([[1.0, 1.0, high], [1.0, 1.0, high]]), 0.4, GATED).mask
        for high in (WIDEST, 1e6 * WIDEST)
    ]
    torch.testing.assert_close(moved[0], moved[1])


@pytest.mark.parametrize("prices", [[0.0, 0.0, 0.0], [-1.0, -2.0, -3.0]])
def test_prices_that_say_nothing_move_nothing(prices: list[float]) -> None:
    densities = scale_to(Densities(torch.tensor([0.9, 0.5, 0.2]), torch.tensor([0.6, 0.4, 0.1])), 0.5, GATED)
    moved = move(densities, torch.tensor([prices, prices]), 0.5, GATED)
    torch.testing.assert_close(moved.mask, densities.mask)


def test_few_positive_prices_keep_their_order() -> None:
    densities = Densities(torch.full((4,), 0.5), torch.full((4,), 0.4))
    moved = move(densities, torch.tensor([[-1.0, 0.0, 1.0, 2.0]] * 2), 0.4, GATED)
    assert moved.mask[0] < moved.mask[1] < moved.mask[2] < moved.mask[3]


def test_prices_are_averaged_relative_to_their_mean() -> None:
    first = remember(torch.empty(0), torch.tensor([[1.0, 3.0], [2.0, 2.0]]))
    assert first.tolist() == [[0.5, 1.5], [1.0, 1.0]]
    second = remember(first, 1e-3 * torch.tensor([[4.0, 0.0], [2.0, 2.0]]))
    expected = MEMORY * first + (1 - MEMORY) * torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    torch.testing.assert_close(second, expected)


def test_unknown_prices_stay_as_they_were() -> None:
    found = torch.tensor([[float("nan"), 3.0], [1.0, float("inf")]])
    assert remember(torch.empty(0), found).tolist() == [[1.0, 1.5], [0.5, 1.0]]
    earlier = torch.tensor([[0.2, 1.0], [1.0, 4.0]])
    after = remember(earlier, found)
    assert after[0, 0] == pytest.approx(0.2)
    assert after[1, 1] == pytest.approx(4.0)


@pytest.mark.parametrize("found", [[[-1.0, -2.0], [0.0, 0.0]], [[float("nan")] * 2] * 2])
def test_a_step_without_a_positive_price_says_nothing(found: list[list[float]]) -> None:
    earlier = torch.tensor([[0.2, 1.0], [1.0, 4.0]])
    torch.testing.assert_close(remember(earlier, torch.tensor(found)), earlier)
    assert remember(torch.empty(0), torch.tensor(found)).tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_a_very_negative_price_is_forgotten_soon() -> None:
    prices = remember(torch.empty(0), torch.tensor([[1.0, -1e9], [1.0, 1.0]]))
    assert prices.min() == -WIDEST
    for _ in range(8):
        prices = remember(prices, torch.ones(2, 2))
    assert prices.min() > 0


def search_of(case: KlCase, *, seed: int = 0, batch: int = 2) -> PathSearch:
    return PathSearch(case.model, case.spec, case.sequences, case.blended, case.scale, batch, seed)


def sweep(search: PathSearch, state: PathState, until: int = WARM_UP + STEPS) -> PathState:
    while state.step < until:
        search.advance(state)
    return state


def assert_same(first: PathState, second: PathState) -> None:
    assert first.step == second.step
    for name in ("mask_densities", "token_densities"):
        assert torch.equal(torch.stack(getattr(first, name)), torch.stack(getattr(second, name)))
    assert torch.equal(first.token_thresholds, second.token_thresholds)
    assert torch.equal(first.prices, second.prices)
    assert torch.equal(first.histogram.counts, second.histogram.counts)


@pytest.fixture(scope="module")
def swept(kl_case: KlCase) -> PathState:
    search = search_of(kl_case)
    return sweep(search, search.start())


def test_the_first_state_has_every_layer_alike_at_the_first_share(kl_case: KlCase) -> None:
    state = search_of(kl_case).start()
    assert state.densities.ffn_share(GATED) == pytest.approx(FIRST_SHARE)
    assert len(state.densities.mask.unique()) == len(state.densities.token.unique()) == 1
    assert (state.token_thresholds > 0).all()


def test_densities_follow_the_shares_of_steps(swept: PathState) -> None:
    assert swept.step == len(swept.mask_densities) == len(swept.token_densities) == WARM_UP + STEPS
    for step, (mask, token) in enumerate(zip(swept.mask_densities, swept.token_densities, strict=True)):
        densities = Densities(mask, token)
        assert densities.ffn_share(GATED) == pytest.approx(share_of_step(step), abs=1e-5)
        check_bounds(densities)


@pytest.mark.parametrize("stop", [0, 1, WARM_UP, 17])
def test_an_interrupted_sweep_goes_on_as_if_it_had_not_been(kl_case: KlCase, swept: PathState, stop: int) -> None:
    search = search_of(kl_case)
    saved = copy.deepcopy(sweep(search, search.start(), stop))
    assert_same(sweep(search_of(kl_case), saved), swept)


def test_a_seed_fixes_the_path(kl_case: KlCase, swept: PathState) -> None:
    other = search_of(kl_case, seed=1)
    assert not torch.equal(torch.stack(sweep(other, other.start()).mask_densities), torch.stack(swept.mask_densities))


@pytest.mark.parametrize("batch", [1, 3, 4, 9])
def test_every_sequence_has_its_turn(kl_case: KlCase, batch: int) -> None:
    search, number = search_of(kl_case, batch=batch), len(kl_case.sequences)
    size = min(batch, number)
    drawn = []
    for step in range(WARM_UP + STEPS):
        sequences, blended = search._draw(step)
        assert len(sequences) == len(blended) == size
        indices = [next(i for i, one in enumerate(kl_case.sequences) if one is sequence) for sequence in sequences]
        assert all(kl_case.blended[i] is one for i, one in zip(indices, blended, strict=True))
        drawn += indices
    counts = [drawn.count(i) for i in range(number)]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("important", [0, 1, 2])
def test_a_layer_that_matters_more_keeps_more(kl_case: KlCase, important: int) -> None:
    case = with_down_scaled(kl_case, [1.0 if layer == important else 0.1 for layer in range(3)])
    search = search_of(case)
    found = densities_at(sweep(search, search.start()), 0.4, GATED)
    share = (found.mask + 2 * found.token) / 3
    others = [float(share[layer]) for layer in range(3) if layer != important]
    assert float(share[important]) > 2 * max(others)


def test_one_sequence_is_enough(kl_case: KlCase) -> None:
    search = PathSearch(
        kl_case.model, kl_case.spec, kl_case.sequences[:1], kl_case.blended[:1], kl_case.scale, batch=2, seed=0
    )
    state = sweep(search, search.start(), 3)
    assert state.densities.mask.isfinite().all()


@given(share=st.floats(0.2, 0.95))
def test_densities_at_a_share_hit_it(swept: PathState, share: float) -> None:
    found = densities_at(swept, share, GATED)
    assert found.ffn_share(GATED) == pytest.approx(share, abs=1e-5)
    check_bounds(found)


@pytest.mark.parametrize(
    ("share", "first"), [(FIRST_SHARE, 0), (LAST_SHARE, STEPS - 3), (share_of_step(WARM_UP + 9), 8)]
)
def test_densities_are_means_of_the_three_nearest_steps(swept: PathState, share: float, first: int) -> None:
    steps = [WARM_UP + first + i for i in range(3)]
    means = [
        torch.stack(
            [math.e ** sum(math.log(float(row[layer])) / 3 for row in rows) * torch.ones(()) for layer in range(3)]
        )
        for rows in ([swept.mask_densities[s] for s in steps], [swept.token_densities[s] for s in steps])
    ]
    expected, found = scale_to(Densities(*means), share, GATED), densities_at(swept, share, GATED)
    torch.testing.assert_close(found.mask, expected.mask, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.token, expected.token, rtol=1e-4, atol=1e-5)


def test_estimates_are_collected_of_every_sequence(kl_case: KlCase) -> None:
    histogram, told = EstimateHistogram(3, torch.device("cpu")), []
    level = Level(score_thresholds(kl_case.blended, torch.tensor([1.0, 0.5, 0.25])), torch.zeros(3))
    collect_estimates(
        kl_case.model,
        kl_case.spec,
        kl_case.sequences,
        kl_case.blended,
        level,
        kl_case.scale,
        kl_case.down,
        histogram,
        told.append,
    )
    tokens = sum(len(sequence.log_probs) for sequence in kl_case.sequences)
    assert told == [1] * len(kl_case.sequences)
    assert histogram.total.tolist() == [tokens * kl_case.spec.ffn_size] * 3
    assert (histogram.counts.sum(dim=1) / histogram.total).tolist() == pytest.approx([1.0, 0.5, 0.25])
