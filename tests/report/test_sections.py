"""Sections on a calibration show the values in the calibration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tda_export.calibration.budgets import Budget
from tda_export.calibration.file import Calibration, read_calibration
from tda_export.calibration.kl_table import FITTED, HELD_OUT
from tda_export.report.sections import (
    allocation_section,
    curves_of,
    curves_section,
    sensitivity_section,
    stored_allocation,
    unmet_section,
)
from tests.report.svg import by_class, centre, parse, reader


@pytest.fixture(scope="session")
def calibration(tiny_calibration: Path) -> Calibration:
    return read_calibration(tiny_calibration)


def drawn(calibration: Calibration, budget: Budget) -> list[np.ndarray]:
    """Return the points (x, y) of the three charts of curves."""
    figures = curves_section(curves_of(calibration), calibration.allocate(budget)).figures
    found = []
    for figure, log in zip(figures, (True, True, False), strict=True):
        root = parse(figure.chart)
        x, y = reader(root, "x", log=log), reader(root, "y")
        found.append(np.array([(x(a), y(b)) for a, b in map(centre, by_class(root, "mark"))]))
    return found


@pytest.mark.parametrize("budget", [Budget(sparsity=0.5), Budget(max_kl=0.001)], ids=str)
def test_points_of_an_allocation_by_kl_are_those_of_its_table(calibration: Calibration, budget: Budget) -> None:
    allocation = calibration.allocate(budget)
    thresholds, density, cett = map(np.array, (allocation.thresholds, allocation.density, allocation.cett))
    by_cett, by_density, trade = drawn(calibration, budget)
    placed = thresholds > 0
    assert by_cett == pytest.approx(np.stack([thresholds, cett], axis=1)[placed], rel=1e-2, abs=2e-3)
    assert by_density == pytest.approx(np.stack([thresholds, density], axis=1)[placed], rel=1e-2, abs=2e-3)
    shares = np.concatenate([density, allocation.token_density])
    assert trade == pytest.approx(np.stack([shares, np.tile(cett, 2)], axis=1), rel=1e-2, abs=2e-3)
    table = allocation_section(allocation, budget.describe()).tables[0]
    rows = [row for row, there in zip(table.rows, placed, strict=True) if there]
    assert [float(str(row[2])) for row in rows] == pytest.approx(by_density[:, 1].tolist(), rel=1e-2, abs=2e-3)
    assert [float(str(row[3])) for row in rows] == pytest.approx(by_cett[:, 1].tolist(), rel=1e-2, abs=2e-3)
    captions = [figure.caption for figure in curves_section(curves_of(calibration), allocation).figures]
    assert all("may lie beside the curves" in caption and "prior of 64 tokens" in caption for caption in captions)
    assert ["has no place here" in caption for caption in captions] == [not placed.all(), not placed.all(), False]


@pytest.mark.parametrize("budget", [Budget(cett=0.2), Budget(sparsity=0.5, allocation="uniform")], ids=str)
def test_points_of_other_allocations_are_on_the_curves(calibration: Calibration, budget: Budget) -> None:
    curves, allocation = curves_of(calibration), calibration.allocate(budget)
    at = np.searchsorted(curves.grid, np.array(allocation.thresholds, np.float32))
    rows = np.arange(len(at))
    by_cett, by_density, trade = drawn(calibration, budget)
    assert by_cett[:, 1] == pytest.approx(curves.cett[rows, at], abs=2e-3)
    assert by_density[:, 1] == pytest.approx(curves.density[rows, at], abs=2e-3)
    assert trade == pytest.approx(np.stack([curves.density[rows, at], curves.cett[rows, at]], axis=1), abs=2e-3)
    captions = [figure.caption for figure in curves_section(curves, allocation).figures]
    assert all(caption.endswith("Points: the chosen thresholds.") for caption in captions)


def test_budget_beyond_the_path(calibration: Calibration) -> None:
    budget = Budget(sparsity=0.95)
    assert stored_allocation(calibration, budget) is None
    text = " ".join(unmet_section(calibration, budget.describe()).paragraphs)
    assert calibration.kl is not None
    assert "The stored budget (sparsity 0.95, allocation kl) cannot be met" in text
    assert f"its KL path ends at sparsity {1 - float(calibration.kl.share[-1]):.3f}" in text
    curves = curves_section(curves_of(calibration), None)
    assert not any(by_class(parse(figure.chart), "mark") for figure in curves.figures)
    assert curves.figures[0].caption == "CETT by threshold."


def test_budget_by_kl_of_curves_alone(calibration: Calibration) -> None:
    alone, budget = replace(calibration, kl=None), Budget(max_kl=0.1)
    assert stored_allocation(alone, budget) is None
    text = " ".join(unmet_section(alone, budget.describe()).paragraphs)
    assert "The stored budget (max_kl 0.1) cannot be met" in text
    assert "holds CETT curves alone" in text


def test_kl_of_every_setting(calibration: Calibration) -> None:
    """Predicted KL is only the KL of all layers on sequences that the path was not fitted to."""
    table = calibration.kl
    assert table is not None
    section = sensitivity_section(calibration)
    shown = section.tables[0]
    assert list(shown.columns) == [
        "share of FFN bytes",
        "fitted sequences",
        "other sequences (predicted KL)",
        "sum of single layers",
    ]
    assert len(shown.rows) == len(table.share)
    for row, share, kl, error, alone in zip(
        shown.rows, table.share, table.kl, table.kl_stderr, table.sensitivity.sum(dim=1), strict=True
    ):
        assert row == [
            f"{share:.3f}",
            f"{kl[FITTED]:.4f} ± {error[FITTED]:.4f}",
            f"{kl[HELD_OUT]:.4f} ± {error[HELD_OUT]:.4f}",
            f"{alone:.4f}",
        ]
    assert not section.notes
    # At a setting of the path, the allocation's prediction is the table's.
    allocation = calibration.allocate(Budget(sparsity=1 - float(table.share[3])))
    assert allocation.kl == pytest.approx(table.predicted_kl[3], rel=1e-3)
    assert f"Predicted KL to dense: {allocation.kl:.3f}" in allocation_section(allocation, {}).paragraphs[1]


def test_kl_of_one_sequence(calibration: Calibration) -> None:
    """As after `calibrate --sequences 1`: no standard errors, and no held-out sequence."""
    assert calibration.kl is not None
    kl = calibration.kl.kl[:, :1].expand(-1, 2)
    one = replace(calibration, kl=replace(calibration.kl, kl=kl, kl_stderr=torch.zeros_like(kl)))
    section = sensitivity_section(one)
    assert not any("±" in str(cell) for row in section.tables[0].rows for cell in row)
    assert section.notes == ["The calibration read one sequence, so both columns are of it."]
