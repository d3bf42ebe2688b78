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

    def at(self, thresholds: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        """Return density and CETT [L] at one threshold a layer: those of the first grid threshold that reaches it."""
        asked = np.asarray(thresholds, self.grid.dtype)
        chosen = np.minimum(np.searchsorted(self.grid, asked), len(self.grid) - 1)
        rows = np.arange(len(chosen))
        return self.density[rows, chosen], self.cett[rows, chosen]


def curve_chart(curves: Curves, values: np.ndarray, y: Axis, title: str, thresholds: Sequence[float] | None) -> Markup:
    """Draw a value of every layer against the threshold, and a point at the layer's chosen threshold.

    Args:
        curves: Give the thresholds that are worth drawing: from where a layer drops its first neurons to where all
            have dropped nearly all.
        values: float [L, K], either of the curves' own.
        y: Its axis.
        title: For screen readers.
        thresholds: L chosen thresholds, or None.
    """
    layers = len(values)
    x, columns = threshold_axis(curves)
    series = [
        Series(f"layer {i}", curves.grid[columns].tolist(), values[i, columns].tolist(), marks=False, ramp=(i, layers))
        for i in range(layers)
    ]
    if thresholds is not None:
        at = np.minimum(np.searchsorted(curves.grid, np.asarray(thresholds, curves.grid.dtype)), len(curves.grid) - 1)
        series += [
            Series("", [thresholds[i]], [values[i, at[i]]], names=[f"layer {i}, chosen"], ramp=(i, layers))
            for i in range(layers)
            if x.low <= thresholds[i] <= x.high
        ]
    return line_chart(title, series, x, y, ramp=("layer 0", f"layer {layers - 1}"))


def threshold_axis(curves: Curves) -> tuple[Axis, np.ndarray]:
    """Choose the range of thresholds to draw, and the columns of the curves in it, evenly spaced on the log axis."""
    moving = (curves.density.min(axis=0) < 0.995) & (curves.density.max(axis=0) > 0.005) & (curves.grid > 0)
    inside = np.flatnonzero(moving)
    if not len(inside):
        inside = np.flatnonzero((curves.grid > 0) & (curves.grid <= 1))
    x = around(THRESHOLD, [float(curves.grid[inside[0]]), float(curves.grid[inside[-1]])], log=True)
    places = np.geomspace(x.low, min(x.high, 1.0), POINTS)
    columns = np.unique(np.minimum(np.searchsorted(curves.grid, places), len(curves.grid) - 1))
    return x, columns


def trade_chart(curves: Curves, thresholds: Sequence[float] | None) -> Markup:
    """Draw each layer's CETT against its density."""
    layers = len(curves.density)
    wanted = np.linspace(1.0, 0.0, POINTS)
    series = []
    for i in range(layers):
        columns = np.unique(np.searchsorted(-curves.density[i], -wanted).clip(max=len(curves.grid) - 1))
        label = f"layer {i}"
        series.append(
            Series(
                label,
                curves.density[i, columns].tolist(),
                curves.cett[i, columns].tolist(),
                marks=False,
                ramp=(i, layers),
            )
        )
    if thresholds is not None:
        density, cett = curves.at(thresholds)
        series += [
            Series("", [density[i]], [cett[i]], names=[f"layer {i}, chosen"], ramp=(i, layers)) for i in range(layers)
        ]
    x = Axis(DENSITY, 0.0, 1.0)
    y = cett_axis(curves)
    return line_chart("CETT against density, by layer", series, x, y, ramp=("layer 0", f"layer {layers - 1}"))


def cett_axis(curves: Curves) -> Axis:
    """The axis of CETT, from 0 to its largest value."""
    return around(CETT, [float(curves.cett.max())], zero=True)


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
