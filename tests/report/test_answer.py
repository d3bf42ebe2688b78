"""The first section of a report: bytes, loss and speed-up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tda_export.calibration.budgets import Budget
from tda_export.calibration.file import Calibration, read_calibration
from tda_export.calibration.kl_table import HELD_OUT
from tda_export.pricing import PriceTable
from tda_export.report.answer import (
    Answer,
    answer_section,
    mask_answer,
    priced_answer,
    unmeasured_masks,
    unmeasured_prices,
)
from tda_export.report.quality import quality_data
from tda_export.report.speeds import Speed, nearest_speed, short_name, speed_chart
from tda_export.runtime.artifact import open_artifact
from tda_export.runtime.deployment import NO_REFRESH, Refresh
from tests.report.svg import by_class, centre, parse, reader

MIB = 2**20
DENSE = Speed("m", "float32", "a processor", 8, 16, "dense", 1.0, 10.0, 9.0, 11.0)
PRICED = replace(DENSE, name="priced", share=0.62, ms=8.0, low=7.5, high=8.5, speedup=1.25)


@pytest.fixture(scope="session")
def table(priced_artifact: Path) -> PriceTable:
    found = open_artifact(priced_artifact).price_table
    assert found is not None
    return found


def test_prices(table: PriceTable) -> None:
    price = table.price_for(sparsity=0.4)
    kl, head = table.predicted(price).kl, table.predicted(price).head_share
    assert 0 < head < 1
    answer = priced_answer([table], {table.packing: price}, integers=None, linear_bytes=10 * MIB)
    assert answer.lead == (
        f"A token reads 60% of the bytes of the layers' linears (6 of 10 MiB) and {head:.0%} of the head's, and loses "
        f"{kl:.3f} nats a token (predicted KL to reading all of them)."
    )
    assert answer.share == pytest.approx(0.6)
    integers = priced_answer([table], {table.packing: price}, integers=0.25).lead
    assert integers.endswith(
        f"; the integers themselves lost 0.250 to the float model, about {0.25 + kl:.3f} together."
    )


def test_prices_of_two_packings_and_of_no_budget(table: PriceTable) -> None:
    other = replace(table, packing="sites")
    answer = priced_answer([table, other], {table.packing: None, "sites": 0.0}, integers=None)
    assert answer.lead == (
        "No price of the table was chosen (one threshold a matrix). A token reads 100% of the bytes of the layers' "
        "linears (one threshold a site) and 100% of the head's, and loses 0.000 nats a token (predicted KL to reading "
        "all of them)."
    )


def test_what_was_not_measured() -> None:
    dense = "A token reads 100% of the bytes of the layers' linears (10 of 10 MiB) and leaves nothing out (price 0)."
    assert unmeasured_prices(0.0, 10 * MIB).lead == dense
    assert unmeasured_prices(2e-7, 10 * MIB).lead == (
        "A token reads the rows that are worth price 2e-07 a byte. What that saves and costs was not measured."
    )
    masks = "A token reads the FFN neurons of the prompt's mask. What that saves and costs was not measured."
    assert unmeasured_masks(None, MIB) == Answer(masks)
    assert unmeasured_masks(0.25, 8 * MIB).lead == (
        "A token reads 75% of the bytes of the FFN (6 of 8 MiB). What that costs was not measured."
    )


def test_masks_by_kl(tiny_calibration: Path) -> None:
    calibration = read_calibration(tiny_calibration)
    allocation = calibration.allocate(Budget(sparsity=0.5))
    answer = mask_answer(calibration, allocation, refresh=Refresh(10), ffn_bytes=10 * MIB)
    assert answer.share == pytest.approx(0.55)  # one of ten tokens reads every row
    assert answer.lead.startswith("A token reads 55% of the bytes of the FFN (6 of 10 MiB), and loses")
    data = quality_data(calibration)
    assert data is not None
    points = drawn(answer, log=True)
    expected = np.stack([data.share, data.joint[HELD_OUT]], axis=1)
    assert points[:-1] == pytest.approx(expected[np.argsort(data.share)], rel=3e-2)
    assert points[-1] == pytest.approx([1 - allocation.sparsity, allocation.kl], rel=3e-2)
    assert "cannot be met" in mask_answer(calibration, None, refresh=NO_REFRESH).lead


def test_masks_by_cett(tiny_calibration: Path) -> None:
    calibration: Calibration = replace(read_calibration(tiny_calibration), kl=None)
    allocation = calibration.allocate(Budget(cett=0.2))
    answer = mask_answer(calibration, allocation, refresh=NO_REFRESH)
    assert "(CETT, mean over layers). KL was not measured." in answer.lead
    points = drawn(answer, log=False)
    assert points[-1] == pytest.approx([1 - allocation.sparsity, np.mean(allocation.cett)], abs=5e-3)
    assert [1 - allocation.sparsity, 0.2] == pytest.approx(points[4].tolist(), abs=5e-3)


def drawn(answer: Answer, *, log: bool) -> np.ndarray:
    """Return the points of an answer's chart, without the two of the legend."""
    assert answer.figure is not None
    root = parse(answer.figure.chart)
    x, y = reader(root, "x"), reader(root, "y", log=log)
    return np.array([(x(a), y(b)) for a, b in map(centre, by_class(root, "mark"))][2:])


def test_speeds() -> None:
    section = answer_section([Answer("It reads.", 0.6)], "m", [DENSE, PRICED])
    assert section.lead == ["It reads. At 62% of those bytes it takes 8.00 ms a token, 1.25 times as fast as dense."]
    assert [figure.caption for figure in section.figures] == [
        "Speed against bytes: m in float32 on a processor, 8 + 16 tokens. Lower is better."
    ]
    assert section.tables[0].rows[1][1:] == ["priced", "0.620", "8.00", "7.50 to 8.50", "1.25"]
    root = parse(speed_chart([DENSE, PRICED]))
    x, y = reader(root, "x"), reader(root, "y")
    points = [(x(a), y(b)) for a, b in map(centre, by_class(root, "mark"))][2:]
    assert np.array(points) == pytest.approx(np.array([(1.0, 10.0), (0.62, 8.0)]), abs=2e-2)


def test_speeds_of_another_model_or_share_are_not_the_answers() -> None:
    assert nearest_speed([DENSE, PRICED], 0.6, "m") == PRICED
    assert nearest_speed([DENSE, PRICED], 0.6, "other") is None
    assert nearest_speed([DENSE, PRICED], 0.7, "m") is None
    assert nearest_speed([DENSE], 1.0, "m") is None
    section = answer_section([Answer("It reads.", 0.6)], "other", [PRICED])
    assert section.lead == ["It reads."]
    assert len(section.figures) == 1
    assert "bench DIR --json" in answer_section([Answer("It reads.")], "m", []).notes[0]


def test_short_name() -> None:
    assert (short_name("/a/b/model"), short_name("org/model"), short_name("model")) == ("model", "org/model", "model")
