"""From constructed curves to thresholds."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tda_export.calibration.budgets import (
    Allocation,
    Budget,
    allocate,
    allocate_truncation,
    check_reach,
    make_budget,
    nearest_reachable,
)
from tda_export.calibration.curves import CurveSums
from tda_export.calibration.kl_table import KlTable, setting_at, sparsest_within
from tda_export.errors import UsageError
from tda_export.ffn_share import GATED
from tda_export.runtime.deployment import Refresh

GRID = torch.tensor([0.0, 0.1, 0.2, 0.4, 0.8, 2.0])


def curves(cett: list[list[float]], density: list[list[float]] | None = None) -> CurveSums:
    """Make sums of 4 tokens and 2 sequences with these means. Density falls evenly unless given."""
    points = len(cett[0])
    even = [1 - k / (points - 1) for k in range(points)]

    def matrix(rows: list[list[float]]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.float64)

    layers = len(cett)
    nothing = torch.zeros(layers, 0, dtype=torch.float64)
    return CurveSums(
        ratio=matrix(cett) * 4,
        ratio_tokens=torch.full((layers,), 4.0, dtype=torch.float64),
        density=matrix(density or [even] * layers) * 2,
        sequences=torch.tensor([2.0], dtype=torch.float64),
        token_density=nothing,
        score_square=nothing,
        activation=nothing,
        up_square=nothing,
        tokens=torch.tensor([8.0], dtype=torch.float64),
    )


def uniform(sparsity: float) -> Budget:
    return Budget(sparsity=sparsity, allocation="uniform")


RISING = [0.0, 0.1, 0.2, 0.5, 0.9, 1.0]
CROSSING = [0.0, 0.3, 0.1, 0.15, 0.9, 1.0]  # above 0.2 and back


def test_cett_takes_the_largest_threshold_within_the_budget() -> None:
    allocation = allocate(Budget(cett=0.2), curves([RISING, CROSSING]), GRID, ffn_matrices=GATED)
    assert allocation.thresholds == pytest.approx([0.2, 0.4])
    assert allocation.cett == pytest.approx([0.2, 0.15])
    assert allocation.density == pytest.approx([0.6, 0.4])
    assert allocation.recrossing == [1]
    assert allocation.sparsity == pytest.approx(0.5)


def test_a_layer_that_exceeds_only_above_its_threshold_is_no_recrossing() -> None:
    assert allocate(Budget(cett=0.12), curves([RISING, RISING]), GRID, ffn_matrices=GATED).recrossing == []


def test_a_curve_that_never_exceeds_the_budget_gives_the_last_threshold() -> None:
    allocation = allocate(Budget(cett=0.99), curves([[0.0] * 6]), GRID, ffn_matrices=GATED)
    assert allocation.thresholds == [2.0]
    assert allocation.density == [0.0]


def test_cett_zero_drops_only_what_adds_nothing() -> None:
    allocation = allocate(Budget(cett=0), curves([RISING, [0.0, 0.0, 0.0, 0.5, 0.9, 1.0]]), GRID, ffn_matrices=GATED)
    assert allocation.thresholds == pytest.approx([0.0, 0.2])
    assert allocation.cett == [0.0, 0.0]


@settings(deadline=None)
@given(data=st.data(), layers=st.integers(1, 4), points=st.integers(4, 12), budget=st.floats(0, 0.99))
def test_allocation_is_that_of_a_search(data: st.DataObject, layers: int, points: int, budget: float) -> None:
    inner = st.lists(st.floats(0, 1.5), min_size=points - 1, max_size=points - 1)
    cett = [[0.0, *data.draw(inner)] for _ in range(layers)]
    density = [[1.0, *sorted(data.draw(inner), reverse=True)] for _ in range(layers)]
    grid = torch.linspace(0, 2, points)
    sums = curves(cett, density)

    by_cett = allocate(Budget(cett=budget), sums, grid, ffn_matrices=GATED)
    for layer, curve in enumerate(sums.mean_cett.tolist()):
        largest = max(k for k in range(points) if curve[k] <= budget)
        assert by_cett.thresholds[layer] == float(grid[largest])
        assert (layer in by_cett.recrossing) == any(value > budget for value in curve[:largest])

    by_sparsity = allocate(uniform(budget), sums, grid, ffn_matrices=GATED)
    for layer, curve in enumerate(sums.mean_density.tolist()):
        nearest = min(abs(value - (1 - budget)) for value in curve)
        assert abs(by_sparsity.density[layer] - (1 - budget)) == pytest.approx(nearest)


@pytest.mark.parametrize(("sparsity", "threshold"), [(0, 0.0), (0.2, 0.1), (0.29, 0.1), (0.31, 0.2), (0.99, 2.0)])
def test_uniform_takes_the_nearest_density(sparsity: float, threshold: float) -> None:
    allocation = allocate(uniform(sparsity), curves([RISING, CROSSING]), GRID, ffn_matrices=GATED)
    assert allocation.thresholds == pytest.approx([threshold] * 2)
    assert allocation.recrossing == []


def test_uniform_reports_the_density_and_cett_of_what_it_chose() -> None:
    density = [[1.0, 0.9, 0.52, 0.4, 0.1, 0.0], [1.0, 0.55, 0.44, 0.2, 0.1, 0.0]]
    allocation = allocate(uniform(0.5), curves([RISING, CROSSING], density), GRID, ffn_matrices=GATED)
    assert allocation.density == pytest.approx([0.52, 0.55])
    assert allocation.cett == pytest.approx([0.2, 0.3])
    assert allocation.sparsity == pytest.approx(1 - (0.52 + 0.55) / 2)


def test_results_are_plain_numbers() -> None:
    allocation = allocate(Budget(cett=0.2), curves([RISING]), GRID, ffn_matrices=GATED)
    assert json.loads(json.dumps(dataclasses.asdict(allocation))) == dataclasses.asdict(allocation)
    for field in dataclasses.fields(Allocation):
        value = getattr(allocation, field.name)
        assert value is None or all(
            type(one) in (int, float, bool) for one in (value if type(value) is list else [value])
        )
    assert (allocation.token_thresholds, allocation.token_density, allocation.kl) == ([], [], None)
    assert (allocation.prior_tokens, allocation.tail_mean) == (0.0, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"^Give exactly one budget: --cett, --sparsity or --max-kl\.$"),
        ({"cett": 0.2, "sparsity": 0.5}, r"^Give exactly one budget: --cett, --sparsity or --max-kl\."),
        ({"max_kl": 0.1, "sparsity": 0.5}, r"^Give exactly one budget"),
        ({"max_kl": 0.1, "cett": 0.5}, r"^Give exactly one budget"),
        ({"max_kl": 0.0}, r"^--max-kl 0\.0: give a positive number of nats a token, such as 0\.1\.$"),
        ({"max_kl": -0.1}, r"^--max-kl -0\.1: give"),
        ({"max_kl": float("nan")}, r"^--max-kl nan: give"),
        ({"max_kl": float("inf")}, r"^--max-kl inf: give"),
        ({"cett": -0.1}, r"^CETT -0\.1 is outside \[0, 1\)\. Give a fraction such as 0\.2\.$"),
        ({"cett": 1}, r"^CETT 1 is outside \[0, 1\)"),
        ({"sparsity": 50}, r"^sparsity 50 is outside \[0, 1\)"),
        ({"sparsity": -1e-9}, r"^sparsity -1e-09 is outside"),
        ({"sparsity": float("nan")}, r"^sparsity nan is outside"),
        (
            {"sparsity": 0.5, "allocation": "greedy"},
            r"^Allocation 'greedy' is not known\. Use kl, uniform, or update tda-export\.$",
        ),
        ({"cett": 0.2, "allocation": ""}, r"^Allocation '' is not known"),
        ({"cett": 0.2, "allocation": None}, r"^Allocation None is not known"),
    ],
)
def test_invalid_budgets_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Budget(**arguments)


@pytest.mark.parametrize(
    ("budget", "description", "text"),
    [
        (Budget(cett=0.2), {"cett": 0.2}, "CETT 0.2"),
        (Budget(cett=0), {"cett": 0}, "CETT 0"),
        (uniform(0.5), {"sparsity": 0.5, "allocation": "uniform"}, "sparsity 0.5, uniform"),
        (Budget(sparsity=0.5), {"sparsity": 0.5, "allocation": "kl"}, "sparsity 0.5, kl"),
        (Budget(max_kl=0.1), {"max_kl": 0.1}, "KL 0.1"),
    ],
)
def test_budget_describes_itself(budget: Budget, description: dict[str, object], text: str) -> None:
    assert budget.describe() == description
    assert str(budget) == text
    assert budget.by_kl == ("kl" in text.lower())
    assert Budget(**description) == budget  # type: ignore[arg-type]


TOKEN_DENSITY = torch.tensor([[1.0, 0.9, 0.6, 0.4, 0.1, 0.0]] * 2, dtype=torch.float64)


def token_curves() -> CurveSums:
    """Make curves of the token estimator: 8 tokens, and another density of prompts."""
    return dataclasses.replace(curves([RISING, CROSSING]), token_density=TOKEN_DENSITY * 8)


@pytest.mark.parametrize(
    ("sparsity", "threshold", "density"),
    [(0.0, 0.0, 1.0), (0.2, 0.4, 0.4), (0.3, 0.8, 0.1), (1 / 3, 2.0, 0.0)],
)
def test_truncation_saves_a_third_of_what_it_drops(sparsity: float, threshold: float, density: float) -> None:
    allocation = allocate_truncation(Budget(sparsity=sparsity), token_curves(), GRID, ffn_matrices=GATED)
    assert allocation.thresholds == pytest.approx([threshold] * 2)
    assert allocation.density == pytest.approx([density] * 2)
    assert allocation.sparsity == pytest.approx(sparsity)
    assert allocation.recrossing == []


def test_truncation_by_cett_takes_the_curve_of_tokens() -> None:
    allocation = allocate_truncation(Budget(cett=0.2), token_curves(), GRID, ffn_matrices=GATED)
    assert allocation.thresholds == pytest.approx([0.2, 0.4])
    assert allocation.density == pytest.approx([0.6, 0.4])
    assert allocation.recrossing == [1]
    assert allocation.sparsity == pytest.approx(0.5 / 3)


def test_truncation_refuses_more_than_a_third() -> None:
    with pytest.raises(UsageError, match=r"saves at most 1/3 .* sparsity 0.34 is more. Give --sparsity up to 0.333"):
        allocate_truncation(Budget(sparsity=0.34), token_curves(), GRID, ffn_matrices=GATED)


def test_truncation_without_gates_saves_half_of_what_it_drops() -> None:
    allocation = allocate_truncation(Budget(sparsity=0.2), token_curves(), GRID, ffn_matrices=2)
    assert allocation.density == pytest.approx([0.6] * 2)
    assert allocation.sparsity == pytest.approx(0.2)
    with pytest.raises(UsageError, match=r"reads every up row, so it saves at most 1/2 .* Give --sparsity up to 0.5, "):
        allocate_truncation(Budget(sparsity=0.51), token_curves(), GRID, ffn_matrices=2)


@pytest.mark.parametrize("matrices", [2, 3])
def test_sparsity_counts_the_matrices_that_there_are(matrices: int) -> None:
    allocation = allocate(Budget(sparsity=0.5), curves([RISING] * 2), GRID, path_table(), ffn_matrices=matrices)
    mask, token = (sum(values) / 2 for values in (allocation.density, allocation.token_density))
    assert allocation.sparsity == pytest.approx(1 - (mask + (matrices - 1) * token) / matrices)
    one_level = allocate(uniform(0.4), curves([RISING] * 2), GRID, None, ffn_matrices=matrices)
    assert one_level.sparsity == pytest.approx(0.4)


def test_truncation_refuses_curves_of_prompts() -> None:
    with pytest.raises(UsageError, match="Calibrate with 'tda-export calibrate --method tda --estimator token'"):
        allocate_truncation(Budget(cett=0.2), curves([RISING]), GRID, ffn_matrices=GATED)


# By KL


def path_table() -> KlTable:
    """A path of two layers: dense, then three settings."""
    shares = torch.tensor([0.8, 0.5, 0.3])
    rows = torch.stack([shares, shares / 2], dim=1)  # [A, L]
    return KlTable(
        share=shares,
        kl=torch.tensor([[0.01, 0.02], [0.1, 0.2], [0.5, 1.0]]),
        kl_stderr=torch.zeros(3, 2),
        thresholds=0.05 / rows,
        token_thresholds=0.1 / rows,
        mask_density=rows + 0.1,
        token_density=rows,
        cett=1 - rows,
        sensitivity=rows,
        prior_tokens=torch.tensor([64.0]),
    )


@pytest.mark.parametrize("budget", [Budget(sparsity=0.5), Budget(sparsity=0.35), Budget(max_kl=0.2), Budget(max_kl=9)])
def test_budget_by_kl_is_a_point_of_the_path(budget: Budget) -> None:
    table = path_table()
    if budget.sparsity is not None:
        expected = setting_at(table, 1 - budget.sparsity)
    else:
        expected = sparsest_within(table, budget.max_kl or 0.0)
    allocation = allocate(budget, curves([RISING, CROSSING]), GRID, table, ffn_matrices=GATED)
    assert allocation.thresholds == expected.thresholds
    assert allocation.token_thresholds == expected.token_thresholds
    assert (allocation.density, allocation.token_density) == (expected.mask_density, expected.token_density)
    assert (allocation.cett, allocation.kl, allocation.recrossing) == (expected.cett, expected.kl, [])
    assert (allocation.prior_tokens, allocation.tail_mean) == (64.0, True)
    mask, token = sum(expected.mask_density) / 2, sum(expected.token_density) / 2
    assert allocation.sparsity == pytest.approx(1 - (mask + 2 * token) / 3)
    assert json.loads(json.dumps(dataclasses.asdict(allocation))) == dataclasses.asdict(allocation)


def test_less_sparsity_than_dense_has_is_dense_and_says_what_it_has() -> None:
    """Rows of ReLU's zero activations are not read: here those of half of the neurons of an FFN without gates."""
    rest = path_table()
    dense = {"share": [0.75], "kl": [[0.0, 0.0]], "kl_stderr": [[0.0, 0.0]], "mask_density": [[1.0, 1.0]]}
    dense |= {"token_density": [[0.4, 0.6]]}
    columns = {
        field.name: torch.cat(
            [torch.tensor(dense.get(field.name, [[0.0, 0.0]])), getattr(rest, field.name)[1:]]  # the shares end at 0.3
        )
        for field in dataclasses.fields(KlTable)
        if field.name != "prior_tokens"
    }
    table = KlTable(**columns, prior_tokens=rest.prior_tokens)
    allocation = allocate(Budget(sparsity=0.1), curves([RISING, CROSSING]), GRID, table, ffn_matrices=2)
    assert allocation.thresholds == allocation.token_thresholds == [0.0, 0.0]
    assert allocation.kl == 0
    assert allocation.sparsity == pytest.approx(0.25)


@pytest.mark.parametrize("budget", [Budget(cett=0.2), uniform(0.5)])
def test_other_budgets_do_not_look_at_the_path(budget: Budget) -> None:
    sums = curves([RISING, CROSSING])
    assert allocate(budget, sums, GRID, path_table(), ffn_matrices=GATED) == allocate(
        budget, sums, GRID, ffn_matrices=GATED
    )


@pytest.mark.parametrize("budget", [Budget(sparsity=0.5), Budget(max_kl=0.1)])
def test_budget_by_kl_without_a_path_is_refused(budget: Budget) -> None:
    message = (
        r"^This calibration contains only CETT curves\. Calibrate without --curves-only, or give --cett, or --sparsity"
    )
    with pytest.raises(UsageError, match=message):
        allocate(budget, curves([RISING]), GRID, ffn_matrices=GATED)


def test_sparsity_beyond_the_path_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"^Sparsity 0\.9 is more than the calibration measured \(0\.699\)\. Give a lower"
    ):
        allocate(Budget(sparsity=0.9), curves([RISING, RISING]), GRID, path_table(), ffn_matrices=GATED)


@pytest.mark.parametrize("budget", [Budget(cett=0.9), uniform(0.95), Budget(sparsity=0.805), Budget(max_kl=9.0)])
def test_budgets_that_may_be_reached_are_let_pass(budget: Budget) -> None:
    check_reach(budget)


@pytest.mark.parametrize("sparsity", [0.82, 0.9])
def test_a_sparsity_that_cannot_be_reached_is_refused(sparsity: float) -> None:
    message = (
        rf"^Sparsity {sparsity} is more than the KL path is measured at \(about 0\.8\)\. Give a lower --sparsity, or"
    )
    with pytest.raises(UsageError, match=message):
        check_reach(Budget(sparsity=sparsity))


@pytest.mark.parametrize("budget", [Budget(cett=0.9), uniform(0.9), Budget(sparsity=0.699), Budget(max_kl=9.0)])
def test_budgets_within_reach_stay(budget: Budget) -> None:
    assert nearest_reachable(budget, path_table()) == budget
    assert nearest_reachable(budget, None) == budget


@pytest.mark.parametrize("sparsity", [0.702, 0.9])
def test_the_nearest_budget_within_reach_can_be_met(sparsity: float) -> None:
    nearest = nearest_reachable(Budget(sparsity=sparsity), path_table())
    assert nearest == Budget(sparsity=0.699)
    assert allocate(nearest, curves([RISING, RISING]), GRID, path_table(), ffn_matrices=GATED).kl is not None


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        ((0.2, None, None, None), Budget(cett=0.2)),
        ((None, 0.5, None, None), Budget(sparsity=0.5)),
        ((None, 0.5, "uniform", None), uniform(0.5)),
        ((None, None, None, 0.1), Budget(max_kl=0.1)),
    ],
)
def test_budget_of_options(options: tuple[Any, ...], budget: Budget) -> None:
    assert make_budget(*options) == budget


@pytest.mark.parametrize("options", [(None, None, "kl", None), (0.2, None, "kl", None), (None, None, "uniform", 0.1)])
def test_an_allocation_of_nothing_is_refused(options: tuple[Any, ...]) -> None:
    with pytest.raises(
        UsageError, match=r"^--allocation spreads a --sparsity over the layers\. Give --sparsity, or leave"
    ):
        make_budget(*options)


@given(sparsity=st.floats(0, 0.9), tokens=st.integers(2, 100))
def test_refreshes_are_within_a_sparsity(sparsity: float, tokens: int) -> None:
    budget = Budget(sparsity=sparsity)
    if sparsity * tokens / (tokens - 1) >= 1:
        with pytest.raises(
            UsageError, match=rf"with a refresh every {tokens} tokens: the refreshes alone read .* Give"
        ):
            budget.of_sparse_steps(tokens)
        return
    steps = budget.of_sparse_steps(tokens)
    assert steps.sparsity is not None
    assert Refresh(tokens).sparsity(steps.sparsity) == pytest.approx(sparsity)
    assert budget.of_sparse_steps(0) == budget


def test_other_budgets_know_no_refreshes() -> None:
    for budget in (Budget(cett=0.2), Budget(max_kl=0.1)):
        assert budget.of_sparse_steps(2) == budget
