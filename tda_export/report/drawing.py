"""The parts that charts are drawn from: series, axes, marks and legends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tda_export.report.axes import Axis
from tda_export.report.colours import RAMP_STEPS, ramp_colour, series_colour
from tda_export.report.markup import element, number, shorten

WIDTH, HEIGHT = 640, 380
LEFT, RIGHT, TOP, BOTTOM = 66, 18, 14, 50
RAMP_ROOM = 62  # width of the colour bar of ordered series on the right
LEGEND_LINE = 20
CHARACTER = 6.6  # mean width of a legend's characters at 12 px
DASHES = (None, "7 3", "2 3", "9 3 2 3")
MARKS = ("circle", "square", "triangle", "diamond")


@dataclass(frozen=True)
class Series:
    """One line of a chart: N points (x, y); non-finite ones are not drawn.

    `errors` are N standard errors of y, drawn as bars of one standard error in both directions. `band` is the low and
    the high edge of an area, N numbers each. `names` (N) are shown at the pointer. `style` chooses colour, dash and
    mark; a series with `ramp` (index, count) takes its colour from the ramp instead, has no dashes and is not in the
    legend.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: int = 0
    line: bool = True
    marks: bool = True
    errors: Sequence[float] | None = None
    band: tuple[Sequence[float], Sequence[float]] | None = None
    names: Sequence[str] | None = None
    ramp: tuple[int, int] | None = None

    @property
    def colour(self) -> str:
        return ramp_colour(*self.ramp) if self.ramp else series_colour(self.style)


@dataclass(frozen=True)
class Plot:
    """The area of a chart in user units, and its axes."""

    left: float
    top: float
    right: float
    bottom: float
    x: Axis
    y: Axis

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the place of a point."""
        return (
            self.left + self.x.place(x) * (self.right - self.left),
            self.bottom - self.y.place(y) * (self.bottom - self.top),
        )


def svg(title: str, width: float, height: float, parts: Sequence[Markup]) -> Markup:
    """Wrap a drawing in an SVG that fills the available width of the page."""
    return element(
        "svg",
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {number(width)} {number(height)}",
        role="img",
        aria_label=title,
    )


def line(start: tuple[float, float], end: tuple[float, float], **attributes: object) -> Markup:
    return element("line", x1=start[0], y1=start[1], x2=end[0], y2=end[1], **attributes)


def axes(plot: Plot, *, x_ticks: Sequence[float] | None = None, x_grid: bool = True) -> list[Markup]:
    parts = []
    for value in plot.x.ticks() if x_ticks is None else x_ticks:
        place, _ = plot.at(value, plot.y.low)
        if x_grid:
            parts.append(line((place, plot.top), (place, plot.bottom), class_="grid"))
        label = plot.x.write(value)
        parts.append(element("text", label, x=place, y=plot.bottom + 17, text_anchor="middle", class_="tick x"))
    for value in plot.y.ticks():
        _, place = plot.at(plot.x.low, value)
        parts.append(line((plot.left, place), (plot.right, place), class_="grid"))
        label = plot.y.write(value)
        parts.append(element("text", label, x=plot.left - 8, y=place + 4, text_anchor="end", class_="tick y"))
    parts.append(line((plot.left, plot.bottom), (plot.right, plot.bottom), class_="axis"))
    parts.append(line((plot.left, plot.top), (plot.left, plot.bottom), class_="axis"))
    middle = (plot.left + plot.right) / 2
    parts.append(element("text", plot.x.label, x=middle, y=plot.bottom + 40, text_anchor="middle", class_="axis-label"))
    middle = (plot.top + plot.bottom) / 2
    turned = f"rotate(-90 14 {number(middle)})"
    parts.append(
        element("text", plot.y.label, x=14, y=middle, text_anchor="middle", class_="axis-label", transform=turned)
    )
    return parts


def mark(kind: str, x: float, y: float, hint: Markup | None, colour: str) -> Markup:
    inside = [hint] if hint is not None else []
    style = {"style": f"fill:{colour}", "class_": "mark"}
    if kind == "circle":
        return element("circle", *inside, cx=x, cy=y, r=4, **style)
    shapes = {
        "square": ((-3.6, -3.6), (3.6, -3.6), (3.6, 3.6), (-3.6, 3.6)),
        "triangle": ((0, -5.2), (4.6, 2.6), (-4.6, 2.6)),
        "diamond": ((0, -5.2), (5.2, 0), (0, 5.2), (-5.2, 0)),
    }
    corners = points_text([(x + dx, y + dy) for dx, dy in shapes[kind]])
    return element("polygon", *inside, points=corners, **style)


def points_text(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{number(x)},{number(y)}" for x, y in points)


def legend_rows(labels: Sequence[str], room: float) -> list[list[tuple[int, float]]]:
    """Distribute labels over rows: the index and the left end of each label, by row."""
    rows: list[list[tuple[int, float]]] = []
    used = 0.0
    for index, label in enumerate(labels):
        width = 42 + CHARACTER * len(shorten(label, 40))
        if not rows or used + width > room:
            rows.append([])
            used = 0.0
        rows[-1].append((index, used))
        used += width
    return rows


def draw_legend(series: Sequence[Series], rows: list[list[tuple[int, float]]], *, bars: bool = False) -> list[Markup]:
    parts = []
    for row, entries in enumerate(rows):
        y = TOP + row * LEGEND_LINE + 2
        for index, start in entries:
            one, left = series[index], LEFT + start
            if bars:
                parts.append(element("rect", x=left + 8, y=y - 6, width=12, height=12, style=f"fill:{one.colour}"))
            elif one.line:
                dash = DASHES[one.style % len(DASHES)]
                look = {"style": f"stroke:{one.colour}", "class_": "line", "stroke_dasharray": dash}
                parts.append(line((left, y), (left + 26, y), **look))
            if one.marks and not bars:
                parts.append(mark(MARKS[one.style % len(MARKS)], left + 13, y, None, one.colour))
            parts.append(element("text", shorten(one.label, 40), x=left + 32, y=y + 4, class_="legend"))
    return parts


def ramp_legend(plot: Plot, names: tuple[str, str]) -> list[Markup]:
    left, height = plot.right + 14, min(plot.bottom - plot.top - 40, 200)
    top = plot.top + 20
    step = height / RAMP_STEPS
    parts = [
        element(
            "rect",
            x=left,
            y=top + index * step,
            width=12,
            height=step + 0.5,
            style=f"fill:{ramp_colour(index, RAMP_STEPS)}",
        )
        for index in range(RAMP_STEPS)
    ]
    parts.append(element("text", names[0], x=left, y=top - 7, class_="legend"))
    parts.append(element("text", names[1], x=left, y=top + height + 16, class_="legend"))
    return parts
