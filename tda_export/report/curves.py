"""Charts of CETT and density curves, and of what was chosen from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from tda_export.report.axes import Axis, around
from tda_export.report.charts import bar_chart, line_chart
from tda_export.report.drawing import Series

POINTS = 120  # of a drawn curve
DENSITY = "density (share of neurons kept)"
CETT = "CETT (mean relative error of the FFN output)"
THRESHOLD = "threshold on the neuron score (log scale)"


@dataclass(frozen=True)
class Curves:
    """Curves of L layers over K ascending thresholds, float [K] and [L, K]: shares, and CETT without unit."""

    grid: np.ndarray
    cett: np.ndarray
    density: np.ndarray


@dataclass(frozen=True)
class Chosen:
    """What was chosen for each layer and what calibration expects of it, lists of L.

    `thresholds` on the neuron score; `density`: shares of neurons in the mask; `cett`: of all that is dropped. With two
    levels, `token_density` is the share of neurons that a token does not skip; empty without.
    """

    thresholds: Sequence[float]
    density: Sequence[float]
    cett: Sequence[float]
    token_density: Sequence[float] = ()


def cett_chart(curves: Curves, chosen: Chosen | None) -> Markup:
    """Draw CETT of every layer against the threshold, and a point at what was chosen."""
    y = cett_axis(curves, chosen)
    return _by_threshold("CETT by threshold", curves, curves.cett, y, chosen, chosen.cett if chosen else ())


def density_chart(curves: Curves, chosen: Chosen | None) -> Markup:
    """Draw density of every layer against the threshold, and a point at what was chosen: the density of the mask."""
    y = Axis(DENSITY, 0.0, 1.0)
    return _by_threshold("Density by threshold", curves, curves.density, y, chosen, chosen.density if chosen else ())


def _by_threshold(
    title: str, curves: Curves, values: np.ndarray, y: Axis, chosen: Chosen | None, points: Sequence[float]
) -> Markup:
    """Draw values [L, K] of the curves, and L points at the chosen thresholds; 0 has no place on the log axis."""
    layers = len(values)
    x, columns = threshold_axis(curves, chosen.thresholds if chosen else ())
    series = [
        Series(f"layer {i}", curves.grid[columns].tolist(), values[i, columns].tolist(), marks=False, ramp=(i, layers))
        for i in range(layers)
    ]
    if chosen:
        series += [_point(i, layers, chosen.thresholds[i], points[i], "chosen") for i in range(layers)]
    return line_chart(title, series, x, y, ramp=("layer 0", f"layer {layers - 1}"))


def _point(layer: int, layers: int, x: float, y: float, what: str, style: int = 0) -> Series:
    return Series("", [x], [y], style=style, names=[f"layer {layer}, {what}"], ramp=(layer, layers))


def threshold_axis(curves: Curves, chosen: Sequence[float] = ()) -> tuple[Axis, np.ndarray]:
    """Choose the thresholds to draw, and the columns of the curves in that range, evenly spaced on the log axis.

    From where a layer drops its first neurons to where all have dropped nearly all, and around the chosen ones.
    """
    moving = (curves.density.min(axis=0) < 0.995) & (curves.density.max(axis=0) > 0.005) & (curves.grid > 0)
    inside = np.flatnonzero(moving)
    if not len(inside):
        inside = np.flatnonzero((curves.grid > 0) & (curves.grid <= 1))
    x = around(THRESHOLD, [float(curves.grid[inside[0]]), float(curves.grid[inside[-1]]), *chosen], log=True)
    places = np.geomspace(x.low, min(x.high, 1.0), POINTS)
    columns = np.unique(np.minimum(np.searchsorted(curves.grid, places), len(curves.grid) - 1))
    return x, columns


def trade_chart(curves: Curves, chosen: Chosen | None) -> Markup:
    """Draw each layer's CETT against its density, and what was chosen.

    A circle stands at the density of the mask; with two levels, a square at the share of neurons that a token reads.
    """
    layers = len(curves.density)
    wanted = np.linspace(1.0, 0.0, POINTS)
    series = []
    for i in range(layers):
        columns = np.unique(np.searchsorted(-curves.density[i], -wanted).clip(max=len(curves.grid) - 1))
        density, cett = curves.density[i, columns].tolist(), curves.cett[i, columns].tolist()
        series.append(Series(f"layer {i}", density, cett, marks=False, ramp=(i, layers)))
    if chosen:
        second = chosen.token_density
        what = "mask" if second else "chosen"
        series += [_point(i, layers, chosen.density[i], chosen.cett[i], what) for i in range(layers)]
        series += [_point(i, layers, second[i], chosen.cett[i], "read by a token", 1) for i in range(len(second))]
    x, y = Axis(DENSITY, 0.0, 1.0), cett_axis(curves, chosen)
    return line_chart("CETT against density, by layer", series, x, y, ramp=("layer 0", f"layer {layers - 1}"))


def cett_axis(curves: Curves, chosen: Chosen | None) -> Axis:
    """The axis of CETT, from 0 to its largest value."""
    return around(CETT, [float(curves.cett.max()), *(chosen.cett if chosen else ())], zero=True)


def allocation_chart(density: Sequence[float], second: Sequence[float] | None = None) -> Markup:
    """Draw the density that was chosen for each layer.

    Args:
        density: L shares of neurons in the mask: of all three matrices, or of the gate alone where there is a second.
        second: With two levels, L shares of neurons whose up and down rows are read; or None.
    """
    series = [Series("mask" if second is None else "mask (gate rows)", [], density, style=0)]
    if second is not None:
        series.append(Series("above token threshold (up, down rows)", [], second, style=1))
    mean = float(np.mean(density)) if second is None else None
    return bar_chart("Density by layer", series, "layer", Axis(DENSITY, 0.0, 1.0), mean=mean)
