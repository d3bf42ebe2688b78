"""Sections on prices show the measurements."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tda_export.calibration.file import Calibration, read_calibration
from tda_export.calibration.price_file import Priced
from tda_export.packing import PACKINGS
from tda_export.report.priced_sections import (
    artifact_prices,
    calibration_prices,
    layer_densities,
    layers_chart,
    parts_chart,
    price_chart,
    together,
)
from tda_export.runtime.artifact import open_artifact
from tests.report.svg import by_class, centre, parse, reader


@pytest.fixture(scope="session")
def calibration(priced_calibration: Path) -> Calibration:
    return read_calibration(priced_calibration)


@pytest.fixture(scope="session")
def priced(calibration: Calibration) -> Priced:
    assert calibration.priced is not None
    return calibration.priced


def marks(chart: str, *, log: bool, legends: int) -> np.ndarray:
    """Return the points of a chart, without those of the legend."""
    root = parse(chart)
    x, y = reader(root, "x"), reader(root, "y", log=log)
    return np.array([(x(a), y(b)) for a, b in map(centre, by_class(root, "mark"))][legends:])


def test_points_are_the_tables(priced: Priced) -> None:
    tables = list(priced.tables().values())
    expected = [(row.share, row.kl) for table in tables for row in table.rows if row.kl > 0]
    assert len(tables) == 2
    drawn = marks(price_chart(tables), log=True, legends=2)
    assert drawn == pytest.approx(np.array(expected), rel=3e-2, abs=1e-3)
    assert len(by_class(parse(price_chart(tables)), "error")) == 3 * len(expected)


def test_the_chosen_price_is_marked(priced: Priced) -> None:
    tables = list(priced.tables().values())
    chosen = {table.packing: table.price_for(sparsity=0.4) for table in tables}
    root = parse(price_chart(tables, chosen))
    assert [text.text for text in by_class(root, "legend")][-1] == "chosen"
    drawn = marks(price_chart(tables, chosen), log=True, legends=3)[-len(tables) :]
    expected = [(0.6, table.predicted(chosen[table.packing]).kl) for table in tables]
    assert drawn == pytest.approx(np.array(expected), rel=3e-2, abs=1e-3)
    beyond = {table.packing: 2 * table.most_price for table in tables}
    assert price_chart(tables, beyond) == price_chart(tables)


def test_lines_that_are_one() -> None:
    parts = {"q": [0.5, 0.4], "k": [0.5, 0.4], "o": [0.5, 0.3], "v": [0.5, 0.4]}
    assert together(parts) == {"q, k, v": [0.5, 0.4], "o": [0.5, 0.3]}


@pytest.mark.parametrize("packing", PACKINGS)
def test_densities_by_part_and_layer(priced: Priced, packing: str) -> None:
    table, measured = priced.tables()[packing], priced.measured[packing]  # type: ignore[index]
    parts = list(priced.linears)
    # The parts of a site have one line.
    lines = parts if packing == "separate" else ["q", "o", "gate", "down", "head"]
    drawn = marks(parts_chart(table), log=False, legends=len(lines))
    assert drawn == pytest.approx(
        np.array([(row.share, row.parts[part]) for part in lines for row in table.rows]), abs=4e-3
    )
    for row in table.rows:
        found = layer_densities(priced, packing, row.price)  # type: ignore[arg-type]
        assert found.row == row
        place = table.rows.index(row)
        assert "head" not in found.parts  # it is in no layer
        for part in [part for part in parts if part != "head"]:
            read = measured.read[part][place] / (measured.tokens * priced.linears[part][0])
            assert found.parts[part] == pytest.approx(read.tolist())
            assert np.mean(found.parts[part]) == pytest.approx(row.parts[part])
        inside = [part for part in lines if part != "head"]
        if len(together(found.parts)) != len(inside):
            continue  # near dense, other lines coincide too
        layers = marks(layers_chart(found), log=False, legends=len(inside))
        expected = [(layer, value) for part in inside for layer, value in enumerate(found.parts[part])]
        assert layers == pytest.approx(np.array(expected), abs=8e-3)
    nearest = layer_densities(priced, packing, None).row  # type: ignore[arg-type]
    assert abs(nearest.share - 0.5) == min(abs(row.share - 0.5) for row in table.rows)


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"sparsity": 0.5}, "which reads 0.500 of the linears' bytes"),
        ({"max_kl": 1e-3}, "at a predicted KL of 0.0010 nats a token"),
        ({"sparsity": 0.4, "allocation": "kl"}, "which reads 0.600 of the linears' bytes"),
        ({"sparsity": 0.999}, "no price of this table was chosen"),
        ({"cett": 0.2}, "no price of this table was chosen"),
    ],
    ids=str,
)
def test_the_budget_of_the_file(calibration: Calibration, priced: Priced, budget: dict[str, float], said: str) -> None:
    other = replace(calibration, provenance=calibration.provenance | {"budget": budget})
    densities, prices = calibration_prices(other, priced)
    assert [said in note for note in prices.notes] == [True, True, False]
    assert len(densities.tables) == 2
    assert len(densities.tables[0].rows) == priced.sums.square["o"].shape[0]


def test_one_sequence_has_no_standard_error(priced: Priced) -> None:
    measured = priced.measured["separate"]
    one = replace(measured, kl=measured.kl[:1], agreement=measured.agreement[:1])
    table = replace(priced, measured={"separate": one}).table("separate")
    densities, prices = artifact_prices(table, 0.0, None)
    assert (len(densities.figures), densities.tables) == (1, [])  # by matrix, not by layer
    column = prices.tables[0].columns.index("KL, nats a token")
    assert not any("±" in str(row[column]) for row in prices.tables[0].rows)


def test_prices_of_another_dtype_show_the_same_rows(priced_artifact: Path, priced: Priced) -> None:
    table = open_artifact(priced_artifact).price_table
    assert table is not None
    half = table.rescaled(table.element_bytes // 2)
    for row, other in zip(table.rows, half.rows, strict=True):
        sections = [artifact_prices(table, row.price, priced), artifact_prices(half, other.price, priced)]
        assert sections[0][0].tables == sections[1][0].tables


def test_a_model_of_one_layer(priced: Priced) -> None:
    measured = priced.measured["sites"]
    read = {part: values[:, :1] for part, values in measured.read.items()}
    found = layer_densities(replace(priced, measured={"sites": replace(measured, read=read)}), "sites", None)
    assert layers_chart(found)
    assert torch.is_tensor(measured.prices)
