"""Charts as SVG: pure functions of plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from tda_export.report.axes import Axis, plain
from tda_export.report.drawing import (
    BOTTOM,
    DASHES,
    HEIGHT,
    LEFT,
    LEGEND_LINE,
    MARKS,
    RAMP_ROOM,
    RIGHT,
    TOP,
    WIDTH,
    Plot,
    Series,
    axes,
    draw_legend,
    legend_rows,
    line,
    mark,
    points_text,
    ramp_legend,
    svg,
)
from tda_export.report.markup import element


def line_chart(
    title: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    ramp: tuple[str, str] | None = None,
    references: Sequence[tuple[float, str]] = (),
    diagonal: bool = False,
) -> Markup:
    """Draw lines, points, error bars and bands over two axes.

    Args:
        title: What the chart shows, for screen readers.
        series: The series, drawn in this order.
        x: The horizontal axis.
        y: The vertical axis.
        ramp: The names of the first and the last of ordered series, which get a colour bar instead of a legend.
        references: Values of y that get a dashed horizontal line with a label.
        diagonal: Whether to draw y = x.
    """
    legend = [one for one in series if one.ramp is None and one.label]
    rows = legend_rows([one.label for one in legend], WIDTH - LEFT - RIGHT)
    right = WIDTH - RIGHT - (RAMP_ROOM if ramp else 0)
    plot = Plot(LEFT, TOP + len(rows) * LEGEND_LINE, right, HEIGHT - BOTTOM + len(rows) * LEGEND_LINE, x, y)
    parts = [*axes(plot), *draw_legend(legend, rows)]
    if diagonal:
        low, high = max(x.low, y.low), min(x.high, y.high)
        if low < high:
            parts.append(line(plot.at(low, low), plot.at(high, high), class_="reference"))
    for value, text in references:
        start, end = plot.at(x.low, value), plot.at(x.high, value)
        parts.append(line(start, end, class_="reference"))
        parts.append(element("text", text, x=end[0] - 4, y=end[1] - 4, class_="note halo", text_anchor="end"))
    for one in series:
        parts += _series(plot, one)
    if ramp:
        parts += ramp_legend(plot, ramp)
    return svg(title, WIDTH, HEIGHT + len(rows) * LEGEND_LINE, parts)


def bar_chart(title: str, series: Sequence[Series], x_label: str, y: Axis, *, mean: float | None = None) -> Markup:
    """Draw groups of bars at x = 0, 1, 2, …, with one bar for each series; `mean` is a dashed line.

    Args:
        title: What the chart shows, for screen readers.
        series: The values y of each group; x is ignored.
        x_label: The name of the groups.
        y: The vertical axis; bars begin at its low end.
        mean: The value of y of the dashed line.
    """
    groups = max((len(one.y) for one in series), default=0)
    legend = [one for one in series if one.label] if len(series) > 1 else []
    rows = legend_rows([one.label for one in legend], WIDTH - LEFT - RIGHT)
    x = Axis(x_label, -0.5, max(groups, 1) - 0.5)
    shift = len(rows) * LEGEND_LINE
    plot = Plot(LEFT, TOP + shift, WIDTH - RIGHT, HEIGHT - BOTTOM + shift, x, y)
    every = max(1, math.ceil(groups / 20))
    parts = [*axes(plot, x_ticks=list(range(0, groups, every)), x_grid=False), *draw_legend(legend, rows, bars=True)]
    width = 0.8 / max(len(series), 1)
    for index, one in enumerate(series):
        for group, value in enumerate(one.y):
            if not math.isfinite(value):
                continue
            left, top = plot.at(group - 0.4 + index * width, value)
            right, bottom = plot.at(group - 0.4 + (index + 1) * width, y.low)
            hint = element("title", f"{x_label} {group}: {one.label} {value:.4g}")
            parts.append(
                element(
                    "rect",
                    hint,
                    x=left,
                    y=top,
                    width=right - left - (0.5 if groups < 60 else 0.0),
                    height=bottom - top,
                    style=f"fill:{one.colour}",
                    class_="bar",
                )
            )
    if mean is not None:
        start, end = plot.at(x.low, mean), plot.at(x.high, mean)
        parts.append(line(start, end, class_="reference"))
        text = f"mean {mean:.3f}"
        parts.append(element("text", text, x=end[0] - 4, y=end[1] - 4, class_="note halo", text_anchor="end"))
    return svg(title, WIDTH, HEIGHT + shift, parts)


def _series(plot: Plot, one: Series) -> list[Markup]:
    usable = [
        index
        for index, (x, y) in enumerate(zip(one.x, one.y, strict=True))
        if math.isfinite(x) and math.isfinite(y) and not (plot.y.log and y <= 0) and not (plot.x.log and x <= 0)
    ]
    points = [plot.at(one.x[index], one.y[index]) for index in usable]
    parts = []
    if one.band is not None:
        lower, upper = one.band
        edge = [plot.at(one.x[i], upper[i]) for i in usable] + [plot.at(one.x[i], lower[i]) for i in reversed(usable)]
        parts.append(element("polygon", points=points_text(edge), style=f"fill:{one.colour}", class_="band"))
    if one.line and len(points) > 1:
        dash = None if one.ramp else DASHES[one.style % len(DASHES)]
        label = [element("title", one.label)] if one.label else []
        parts.append(
            element(
                "polyline",
                *label,
                points=points_text(points),
                style=f"stroke:{one.colour}",
                stroke_dasharray=dash,
                class_="line thin" if one.ramp else "line",
            )
        )
    if one.errors is not None:
        for index, point in zip(usable, points, strict=True):
            ends = [one.y[index] + sign * one.errors[index] for sign in (-1, 1)]
            places = [plot.at(one.x[index], end)[1] for end in ends]
            bar = {"style": f"stroke:{one.colour}", "class_": "error"}
            parts.append(line((point[0], places[0]), (point[0], places[1]), **bar))
            parts += [line((point[0] - 3, place), (point[0] + 3, place), **bar) for place in places]
    if one.marks:
        kind = MARKS[one.style % len(MARKS)]
        for index, point in zip(usable, points, strict=True):
            name = one.names[index] if one.names else one.label
            hint = element("title", f"{name}: {plain(float(f'{one.x[index]:.4g}'))}, {float(f'{one.y[index]:.4g}'):g}")
            parts.append(mark(kind, *point, hint, one.colour))
    return parts
