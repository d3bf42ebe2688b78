"""Charts are well-formed, and every point is at the place of its data."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from markupsafe import Markup

from tda_export.report.axes import Axis
from tda_export.report.charts import bar_chart, line_chart
from tda_export.report.curves import Chosen, Curves, allocation_chart, cett_chart, density_chart, trade_chart
from tda_export.report.drawing import Series
from tda_export.report.quality import QualityData, joint_chart, methods_chart, sensitivity_chart, sum_scatter
from tests.report.svg import by_class, centre, corners, parse, reader
from tests.report.test_results import result

X, Y = Axis("share (%)", 0.0, 1.0), Axis("KL (nats)", 0.001, 1.0, log=True)
MARKUP = "<script>alert('x')</script> & \"quotes\""


def test_points_lie_where_the_ticks_say() -> None:
    xs, ys = [0.1, 0.45, 0.9], [0.5, 0.02, 0.003]
    root = parse(line_chart("title", [Series("a", xs, ys), Series("b", xs, ys[::-1], style=1)], X, Y))
    x, y = reader(root, "x"), reader(root, "y", log=True)
    marks = [centre(mark) for mark in by_class(root, "mark")][2:]  # the first two are the legend's
    assert [x(place) for place, _ in marks] == pytest.approx([*xs, *xs], abs=1e-3)
    assert [y(place) for _, place in marks] == pytest.approx([*ys, *ys[::-1]], rel=1e-2)
    line = by_class(root, "line", "polyline")[0]
    assert np.array(corners(line)) == pytest.approx(np.array(marks[:3]), abs=0.02)


def test_error_bars_reach_one_standard_error_each_way() -> None:
    one = Series("a", [0.5], [0.1], errors=[0.05])
    root = parse(line_chart("title", [one], X, Y))
    y = reader(root, "y", log=True)
    bar = by_class(root, "error")[0]
    assert [y(float(bar.get(end, ""))) for end in ("y1", "y2")] == pytest.approx([0.05, 0.15], rel=1e-2)


def test_error_bars_stop_at_the_axis() -> None:
    root = parse(line_chart("title", [Series("a", [0.5], [0.1], errors=[0.2])], X, Y))
    y = reader(root, "y", log=True)
    assert y(float(by_class(root, "error")[0].get("y1", ""))) == pytest.approx(Y.low, rel=1e-2)


def test_band() -> None:
    linear = Axis("y", 0.0, 1.0)
    root = parse(line_chart("t", [Series("a", [0, 1], [0.5, 0.6], band=([0.2, 0.3], [0.7, 0.8]))], X, linear))
    x, y = reader(root, "x"), reader(root, "y")
    edge = [(x(place[0]), y(place[1])) for place in corners(by_class(root, "band")[0])]
    assert np.array(edge) == pytest.approx(np.array([(0, 0.7), (1, 0.8), (1, 0.3), (0, 0.2)]), abs=1e-3)


def test_what_has_no_place_is_left_out() -> None:
    one = Series("", [0.1, 0.2, math.nan, 0.4], [0.0, math.inf, 0.1, 0.1])
    root = parse(line_chart("title", [one], X, Y))
    assert len(by_class(root, "mark")) == 1
    assert not by_class(root, "line", "polyline")


def test_texts_are_escaped_and_long_ones_cut() -> None:
    names = [Series(MARKUP * 3, [0.1], [0.1], names=[MARKUP]), Series("\x00\ud800", [0.1], [0.1])]
    chart = line_chart(MARKUP, names, Axis(MARKUP, 0, 1), Axis(MARKUP, 0, 1), references=[(0.5, MARKUP)])
    assert "<script" not in chart
    root = parse(chart)
    assert root.get("aria-label") == MARKUP
    legends = [element.text or "" for element in by_class(root, "legend")]
    assert len(legends[0]) == 40
    assert legends[1] == "\ufffd\ufffd"


def test_legend_rows_do_not_overlap_the_plot() -> None:
    many = [Series(f"a method with a long name {i}", [0.1], [0.1], style=i) for i in range(8)]
    root = parse(line_chart("title", many, X, Y))
    legends = by_class(root, "legend")
    assert len(legends) == 8
    top = min(float(line.get("y1", "")) for line in by_class(root, "axis"))
    assert max(float(text.get("y", "")) for text in legends) < top
    width = float(root.get("viewBox", "").split()[2])
    assert all(float(text.get("x", "")) + 6.6 * len(text.text or "") < width for text in legends)
    places = [(text.get("x"), text.get("y")) for text in legends]
    assert len(set(places)) == 8


def test_bars() -> None:
    root = parse(bar_chart("t", [Series("a", [], [0.25, math.nan, 1.0]), Series("b", [], [0.5])], "layer", X, mean=0.5))
    y = reader(root, "y")
    bars = by_class(root, "bar")
    assert [y(float(bar.get("y", ""))) for bar in bars] == pytest.approx([0.25, 1.0, 0.5], abs=1e-3)
    x = reader(root, "x")
    middle = [x(float(bar.get("x", "")) + float(bar.get("width", "")) / 2) for bar in bars]
    assert [round(value) for value in middle] == [0, 2, 0]
    assert by_class(root, "reference")


@pytest.fixture
def curves() -> Curves:
    grid = np.concatenate([[0.0], np.geomspace(1e-4, 1, 400), [2.0]]).astype(np.float32)
    density = np.stack([1 / (1 + (grid / middle) ** 3) for middle in (0.01, 0.02)])
    density[:, -1] = 0.0
    return Curves(grid, 1 - density, density)


@pytest.mark.parametrize("chart", [cett_chart, density_chart])
def test_curves(curves: Curves, chart: Callable[[Curves, Chosen | None], Markup]) -> None:
    root = parse(chart(curves, None))
    x, y = reader(root, "x", log=True), reader(root, "y")
    lines = by_class(root, "line", "polyline")
    assert len(lines) == 2
    for line, layer in zip(lines, (0, 1), strict=True):
        for place in corners(line)[::20]:
            density = 1 / (1 + (x(place[0]) / (0.01, 0.02)[layer]) ** 3)
            assert y(place[1]) == pytest.approx(density if chart is density_chart else 1 - density, abs=0.02)
    assert not by_class(root, "mark")


def test_points_are_what_was_chosen_wherever_the_curves_are(curves: Curves) -> None:
    chosen = Chosen([0.03, 2e-5], [0.75, 1.0], [0.4, 1.1], [0.3, 0.6])  # off the curves

    def points(chart: Markup, *, log: bool) -> np.ndarray:
        root = parse(chart)
        x, y = reader(root, "x", log=log), reader(root, "y")
        return np.array([(x(a), y(b)) for a, b in map(centre, by_class(root, "mark"))])

    assert points(cett_chart(curves, chosen), log=True) == pytest.approx(np.array([(0.03, 0.4), (2e-5, 1.1)]), rel=2e-2)
    density = points(density_chart(curves, chosen), log=True)
    assert density == pytest.approx(np.array([(0.03, 0.75), (2e-5, 1.0)]), rel=2e-2)
    both = [(0.75, 0.4), (1.0, 1.1), (0.3, 0.4), (0.6, 1.1)]
    assert points(trade_chart(curves, chosen), log=False) == pytest.approx(np.array(both), abs=2e-3)
    tags = [mark.tag for mark in by_class(parse(trade_chart(curves, chosen)), "mark")]
    assert tags == ["circle", "circle", "polygon", "polygon"]


def test_thresholds_of_zero_have_no_place(curves: Curves) -> None:
    root = parse(cett_chart(curves, Chosen([0.0, 0.01], [1.0, 0.5], [0.0, 0.5])))
    assert len(by_class(root, "mark")) == 1


def test_trade_chart(curves: Curves) -> None:
    root = parse(trade_chart(curves, None))
    x, y = reader(root, "x"), reader(root, "y")
    for line in by_class(root, "line", "polyline"):
        assert all(y(place[1]) == pytest.approx(1 - x(place[0]), abs=1e-3) for place in corners(line))


def test_curves_without_any_drop_are_drawn() -> None:
    """A model whose scores all lie outside the grid, and a single layer."""
    flat = Curves(np.array([0.0, 0.1, 1.0, 2.0], np.float32), np.zeros((1, 4)), np.ones((1, 4)))
    chosen = Chosen([0.0], [1.0], [0.0])
    for chart in (cett_chart, density_chart, trade_chart):
        parse(chart(flat, chosen))


def test_allocation_with_a_second_level() -> None:
    root = parse(allocation_chart([0.5, 0.6], [0.3, 0.2]))
    y = reader(root, "y")
    assert [y(float(bar.get("y", ""))) for bar in by_class(root, "bar")] == pytest.approx(
        [0.5, 0.6, 0.3, 0.2], abs=1e-3
    )
    assert len(by_class(root, "legend")) == 2
    assert not by_class(parse(allocation_chart([0.5, 0.6])), "legend")


def test_sensitivity() -> None:
    kl, share = np.array([[0.1, 0.01, 0.0], [0.2, 0.05, 0.02]]), np.array([[0.2, 0.5, 1.0]] * 2)
    root = parse(sensitivity_chart(kl, share))
    x, y = reader(root, "x"), reader(root, "y", log=True)
    lines = [[(x(place[0]), y(place[1])) for place in corners(line)] for line in by_class(root, "line", "polyline")]
    assert np.array(lines[0]) == pytest.approx(np.array([(0.2, 0.1), (0.5, 0.01)]), rel=2e-2)  # a KL of 0 is not drawn
    assert np.array(lines[1]) == pytest.approx(np.array([(0.2, 0.2), (0.5, 0.05), (1.0, 0.02)]), rel=2e-2)


def test_joint_and_sum() -> None:
    alone = np.array([[0.2, 0.04], [0.1, 0.01]])  # of two layers
    joint, errors = np.array([[0.4, 0.06], [0.5, 0.04]]), np.array([[0.1, 0.02], [0.05, 0.0]])
    data = QualityData(alone, np.full((2, 2), 0.5), np.array([0.5, 0.75]), joint, errors)
    root = parse(joint_chart(data))
    assert [text.text for text in by_class(root, "legend")] == [
        "sum of single layers",
        "fitted sequences",
        "other sequences (predicted KL)",
    ]
    x, y = reader(root, "x"), reader(root, "y", log=True)
    lines = [[(x(place[0]), y(place[1])) for place in corners(line)] for line in by_class(root, "line", "polyline")]
    expected = [[(0.25, row[1]), (0.5, row[0])] for row in (alone.sum(axis=0), *joint)]
    assert np.array(lines) == pytest.approx(np.array(expected), rel=2e-2)
    bars = [bar for bar in by_class(root, "error") if bar.get("x1") == bar.get("x2")]
    assert [[y(float(bar.get(end, ""))) for end in ("y1", "y2")] for bar in bars] == [
        pytest.approx(ends, rel=2e-2) for ends in ([0.04, 0.08], [0.3, 0.5], [0.04, 0.04], [0.45, 0.55])
    ]

    root = parse(sum_scatter(data))
    assert [text.text for text in by_class(root, "axis-label")] == [
        "sum of single layers (nats a token, log scale)",
        "KL of all layers (nats a token, log scale)",
    ]
    x, y = reader(root, "x", log=True), reader(root, "y", log=True)
    marks = [centre(mark) for mark in by_class(root, "mark")][2:]
    assert [x(place) for place, _ in marks] == pytest.approx([0.3, 0.05, 0.3, 0.05], rel=2e-2)
    assert [y(place) for _, place in marks] == pytest.approx(joint.ravel().tolist(), rel=2e-2)
    diagonal = by_class(root, "reference")[0]
    for end in "12":
        place = x(float(diagonal.get(f"x{end}", ""))), y(float(diagonal.get(f"y{end}", "")))
        assert place[0] == pytest.approx(place[1], rel=1e-2)


def test_methods() -> None:
    points = [result(method="griffin", kl=0.2, ffn_bytes=50.0), result(kl=0.1, ffn_bytes=25.0)]
    chart = methods_chart([*points, result(method="dense", kl=0.0, ffn_bytes=100.0)])
    assert chart is not None
    root = parse(chart)
    assert [text.text for text in by_class(root, "legend")] == ["Griffin", "TDA (uniform)"]
    x, y = reader(root, "x"), reader(root, "y", log=True)
    marks = [centre(mark) for mark in by_class(root, "mark")][2:]
    assert np.array([(x(a), y(b)) for a, b in marks]) == pytest.approx(np.array([(0.5, 0.2), (0.25, 0.1)]), rel=2e-2)
    assert methods_chart([result(kl=0.0), result(kl=3e-9)]) is None  # it would stretch the axis
