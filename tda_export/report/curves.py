"""Charts of CETT and density curves, and of the thresholds chosen from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from tda_export.report.axes import Axis, around
from tda_export.report.charts import bar_chart, line_chart
from tda_export.report.drawing import Series

POINTS = 120  # points of a drawn curve
DENSITY = "density (share of neurons kept)"
CETT = "CETT (mean relative error of the FFN output)"
THRESHOLD = "threshold on the neuron score (log scale)"


@dataclass(frozen=True)
class Curves:
    """Curves of L layers over K ascending thresholds, float [K] and [L, K]. Densities are shares; CETT has no unit."""

    grid: np.ndarray
    cett: np.ndarray
    density: np.ndarray


@dataclass(frozen=True)
class Chosen:
    """The thresholds chosen for each layer, and calibration's expectations, lists of L.

    `thresholds`: of neuron scores; `density`: shares of neurons in the prompt mask; `cett`: of all dropped neurons.
    With two levels, `token_density` is the share of neurons that a token does not skip; empty without.
    """

    thresholds: Sequence[float]
    density: Sequence[float]
    cett: Sequence[float]
    token_density: Sequence[float] = ()


def cett_chart(curves: Curves, chosen: Chosen | None) -> Markup:
    """Draw CETT of every layer against the threshold, with a point at the chosen threshold."""
    y = cett_axis(curves, chosen)
    return _by_threshold("CETT by threshold", curves, curves.cett, y, chosen, chosen.cett if chosen else ())


def density_chart(curves: Curves, chosen: Chosen | None) -> Markup:
    """Draw density of every layer against the threshold, with a point at the chosen threshold and the mask's
    density."""
    y = Axis(DENSITY, 0.0, 1.0)
    return _by_threshold("Density by threshold", curves, curves.density, y, chosen, chosen.density if chosen else ())


def _by_threshold(
    title: str, curves: Curves, values: np.ndarray, y: Axis, chosen: Chosen | None, points: Sequence[float]
) -> Markup:
    """Draw values [L, K] of the curves, and L points at the chosen thresholds; a threshold of 0 cannot be shown on the
    log axis."""
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

    The range goes from where a layer drops its first neurons to where all layers have dropped nearly all, and includes
    the chosen thresholds.
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
    """Draw each layer's CETT against its density, with the chosen points.

    A circle marks the density of the prompt mask; with two levels, a square marks the share of neurons that a token
    reads.
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
    """Make the axis of CETT, from 0 to its largest value."""
    return around(CETT, [float(curves.cett.max()), *(chosen.cett if chosen else ())], zero=True)


def allocation_chart(density: Sequence[float], second: Sequence[float] | None = None) -> Markup:
    """Draw the chosen density of each layer.

    Args:
        density: L shares of neurons in the prompt mask, for all three matrices, or only for the gate if `second` is
            given.
        second: With two levels, L shares of neurons whose up and down rows are read; or None.
    """
    series = [Series("mask" if second is None else "mask (gate rows)", [], density, style=0)]
    if second is not None:
        series.append(Series("above token threshold (up, down rows)", [], second, style=1))
    mean = float(np.mean(density)) if second is None else None
    return bar_chart("Density by layer", series, "layer", Axis(DENSITY, 0.0, 1.0), mean=mean)
