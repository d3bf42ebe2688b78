"""Heat maps: a matrix of labelled cells, and pictures of many values as PNG inside SVG."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from tda_export.report.axes import Axis
from tda_export.report.colours import ink_on, viridis, viridis_table
from tda_export.report.drawing import svg
from tda_export.report.markup import element, number

CELL = 34
LABEL_ROOM = 200
PICTURE_WIDTH, PICTURE_HEIGHT = 300, 210  # size of the coloured area
BAR_STEPS = 64


def matrix_chart(title: str, values: np.ndarray, labels: Sequence[str], *, low: float, high: float) -> Markup:
    """Draw a square matrix with its numbers; rows are labelled in words, columns by number.

    Args:
        title: What the chart shows, for screen readers.
        values: float [N, N].
        labels: N short texts.
        low: The value of the darkest colour.
        high: The value of the brightest colour.
    """
    count = len(labels)
    if values.shape != (count, count):
        raise ValueError(f"{values.shape} values for {count} labels.")
    top, parts = 24, []
    for index, label in enumerate(labels):
        middle = top + (index + 0.5) * CELL
        parts.append(
            element(
                "text", f"{label} · {index + 1}", x=LABEL_ROOM - 8, y=middle + 4, text_anchor="end", class_="legend"
            )
        )
        place = LABEL_ROOM + (index + 0.5) * CELL
        parts.append(element("text", index + 1, x=place, y=top - 7, text_anchor="middle", class_="tick"))
    for row in range(count):
        for column in range(count):
            value = float(values[row, column])
            colour = viridis((value - low) / (high - low))
            x, y = LABEL_ROOM + column * CELL, top + row * CELL
            hint = element("title", f"{labels[row]} – {labels[column]}: {value:.3f}")
            parts.append(element("rect", hint, x=x, y=y, width=CELL, height=CELL, fill=colour, class_="cell"))
            text = f"{value:.2f}".replace("0.", ".") if abs(value) < 0.995 else "1"
            parts.append(
                element(
                    "text",
                    text,
                    x=x + CELL / 2,
                    y=y + CELL / 2 + 4,
                    text_anchor="middle",
                    style=f"fill:{ink_on(colour)}",
                    class_="cell-text",
                )
            )
    return svg(title, LABEL_ROOM + count * CELL + 4, top + count * CELL + 4, parts)


def picture_chart(title: str, levels: np.ndarray, x_label: str, y_label: str, x_values: int) -> Markup:
    """Draw a picture with axes: row 0 on top, columns from left to right.

    Args:
        title: The title, shown above the picture.
        levels: Brightness in [0, 1], float [rows, columns].
        x_label: What the columns are.
        y_label: What the rows are.
        x_values: The number at the right end of the horizontal axis, which begins at 0.
    """
    rows = levels.shape[0]
    left, top = 48, 28
    data = base64.b64encode(png(viridis_table(levels.reshape(-1)).reshape(*levels.shape, 3))).decode()
    image = element(
        "image",
        x=left,
        y=top,
        width=PICTURE_WIDTH,
        height=PICTURE_HEIGHT,
        href=f"data:image/png;base64,{data}",
        preserveAspectRatio="none",
        style="image-rendering:pixelated",
    )
    bottom, middle = top + PICTURE_HEIGHT, top + PICTURE_HEIGHT / 2
    parts = [element("text", title, x=left, y=top - 10, class_="picture-title"), image]
    for value in Axis(x_label, 0, x_values).ticks():
        place = left + value / x_values * PICTURE_WIDTH
        parts.append(element("line", x1=place, y1=bottom, x2=place, y2=bottom + 4, class_="axis"))
        parts.append(element("text", f"{value:g}", x=place, y=bottom + 16, text_anchor="middle", class_="tick"))
    for row in range(0, rows, max(1, math.ceil(rows / 6))):
        place = top + (row + 0.5) / rows * PICTURE_HEIGHT
        parts.append(element("text", row, x=left - 6, y=place + 4, text_anchor="end", class_="tick"))
    parts.append(
        element("text", x_label, x=left + PICTURE_WIDTH / 2, y=bottom + 34, text_anchor="middle", class_="axis-label")
    )
    turned = f"rotate(-90 12 {number(middle)})"
    parts.append(element("text", y_label, x=12, y=middle, text_anchor="middle", class_="axis-label", transform=turned))
    return svg(title, left + PICTURE_WIDTH + 14, bottom + 40, parts)


def colour_bar(label: str, low: str, high: str) -> Markup:
    """Draw the legend of a heat map: the colours from the texts `low` to `high`."""
    width, left = 260, 60
    step = width / BAR_STEPS
    parts = [
        element("rect", x=left + i * step, y=18, width=step + 0.4, height=12, fill=viridis(i / (BAR_STEPS - 1)))
        for i in range(BAR_STEPS)
    ]
    parts.append(element("text", label, x=left, y=12, class_="legend"))
    parts.append(element("text", low, x=left - 6, y=28, text_anchor="end", class_="tick"))
    parts.append(element("text", high, x=left + width + 6, y=28, class_="tick"))
    return svg(label, left + width + 130, 34, parts)


def png(pixels: np.ndarray) -> bytes:
    """Encode an RGB picture, uint8 [rows, columns, 3], as PNG."""
    rows, columns, _ = pixels.shape
    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    lines = b"".join(b"\0" + np.ascontiguousarray(row).tobytes() for row in pixels)  # filter 0: unfiltered
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def bucket(values: np.ndarray, columns: int) -> np.ndarray:
    """Average neighbouring columns of float [rows, F] into at most `columns` columns of nearly equal width."""
    columns = min(columns, values.shape[1])
    edges = np.linspace(0, values.shape[1], columns + 1).round().astype(int)
    return np.add.reduceat(values, edges[:-1], axis=1) / np.diff(edges)
