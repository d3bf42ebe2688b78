"""Colours: a qualitative palette and a ramp for lines, which follow light and dark, and a fixed map for pictures.

The palette is Okabe and Ito's, which colour-blind people can distinguish, with variants dark enough for a white page.
The ramp and the map are viridis (light and dark pages use the part of it that stands out on them).
"""

from __future__ import annotations

from typing import Any

import numpy as np

VIRIDIS = (
    "#440154",
    "#482475",
    "#414487",
    "#355f8d",
    "#2a788e",
    "#21918c",
    "#22a884",
    "#44bf70",
    "#7ad151",
    "#bddf26",
    "#fde725",
)
PALETTE_LIGHT = ("#0072b2", "#d55e00", "#008060", "#b0578d", "#9a6a00", "#3a3a3a", "#6a3fb5", "#8b1a1a")
PALETTE_DARK = ("#56b4e9", "#f08a4b", "#2ec4a0", "#e39cc6", "#f0c94d", "#d8d8d8", "#b79cf0", "#f08a8a")
RAMP_STEPS = 16
RAMP_LIGHT, RAMP_DARK = (0.0, 0.8), (0.3, 1.0)  # parts of viridis


def viridis(value: float) -> str:
    """Return the colour of a value in [0, 1] as #rrggbb; values outside take the nearer end."""
    return "#" + "".join(f"{channel:02x}" for channel in viridis_table(np.array([value]))[0])


def viridis_table(values: np.ndarray) -> np.ndarray:
    """Return the colours of values in [0, 1]: float [N] to uint8 [N, 3]."""
    anchors = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in VIRIDIS], np.float64)
    places = np.linspace(0.0, 1.0, len(anchors))
    return np.stack([np.interp(values, places, anchors[:, i]) for i in range(3)], axis=1).round().astype(np.uint8)


def ink_on(colour: str) -> str:
    """Return black or white, whichever is more legible on a colour #rrggbb."""
    linear = [(int(colour[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.18 else "#ffffff"


def series_colour(index: int) -> str:
    """Return the CSS colour of the n-th series of a chart; colours repeat after six, dashes and marks differ then."""
    return f"var(--series-{index % len(PALETTE_LIGHT)})"


def ramp_colour(index: int, count: int) -> str:
    """Return the CSS colour of the n-th of `count` ordered series, such as layers."""
    return f"var(--ramp-{round(index * (RAMP_STEPS - 1) / max(count - 1, 1))})"


def css_variables() -> dict[str, Any]:
    """Return the values of all colour variables, for the page's style: {"light": {name: colour}, "dark": …}."""
    places = np.linspace(0.0, 1.0, RAMP_STEPS)
    return {
        mode: {f"series-{i}": colour for i, colour in enumerate(palette)}
        | {f"ramp-{i}": viridis(low + place * (high - low)) for i, place in enumerate(places)}
        for mode, palette, (low, high) in (("light", PALETTE_LIGHT, RAMP_LIGHT), ("dark", PALETTE_DARK, RAMP_DARK))
    }
