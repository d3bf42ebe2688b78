"""Heat maps and pictures: the right colour at the right place."""

from __future__ import annotations

import base64
import itertools
import struct
import zlib

import numpy as np
import pytest

from tda_export.report.colours import ink_on, viridis
from tda_export.report.heatmap import bucket, colour_bar, matrix_chart, picture_chart, png
from tests.report.svg import by_class, parse


def decode(data: bytes) -> np.ndarray:
    """Decode what `png` writes, checking signature, checksums and filters."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, chunks = 8, {}
    while place < len(data):
        size, kind = struct.unpack(">I4s", data[place : place + 8])
        body = data[place + 8 : place + 8 + size]
        assert struct.unpack(">I", data[place + 8 + size : place + 12 + size])[0] == zlib.crc32(kind + body)
        chunks[kind] = body
        place += 12 + size
    columns, rows, depth, kind_of_colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, kind_of_colour) == (8, 2)
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(rows, 1 + 3 * columns)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(rows, columns, 3)


def test_png_keeps_every_pixel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    assert (decode(png(pixels)) == pixels).all()


def test_viridis() -> None:
    assert [viridis(value) for value in (-1.0, 0.0, 0.5, 1.0, 2.0)] == [
        "#440154",
        "#440154",
        "#21918c",
        "#fde725",
        "#fde725",
    ]
    assert ink_on(viridis(0.0)) == "#ffffff"
    assert ink_on(viridis(1.0)) == "#000000"


@pytest.mark.parametrize(("neurons", "columns"), [(6, 3), (7, 3), (5, 9), (96, 50)])
def test_bucket_averages_neighbours(neurons: int, columns: int) -> None:
    values = np.random.default_rng(0).random((2, neurons))
    found = bucket(values, columns)
    edges = [round(i * neurons / min(columns, neurons)) for i in range(min(columns, neurons) + 1)]
    slow = [[row[a:b].mean() for a, b in itertools.pairwise(edges)] for row in values]
    assert found == pytest.approx(np.array(slow))


def test_matrix() -> None:
    values = np.array([[1.0, 0.5], [0.5, 1.0]])
    root = parse(matrix_chart("t", values, ["a <b>", "c"], low=0.0, high=1.0))
    cells = by_class(root, "cell")
    assert [cell.get("fill") for cell in cells] == [viridis(1.0), viridis(0.5), viridis(0.5), viridis(1.0)]
    assert [text.text for text in by_class(root, "cell-text")] == ["1", ".50", ".50", "1"]
    assert cells[1].get("y") == cells[0].get("y")
    assert float(cells[1].get("x", "")) > float(cells[0].get("x", ""))
    assert [text.text for text in by_class(root, "legend")] == ["a <b> · 1", "c · 2"]
    with pytest.raises(ValueError, match="2 labels"):
        matrix_chart("t", np.ones((3, 3)), ["a", "b"], low=0, high=1)


def test_picture() -> None:
    levels = np.array([[0.0, 0.5, 1.0], [1.0, 0.0, 0.5]])
    root = parse(picture_chart("t", levels, "neurons", "token", 96))
    data = next(root.iter("image")).get("href", "").removeprefix("data:image/png;base64,")
    pixels = decode(base64.b64decode(data))
    colours = [["#" + bytes(pixel).hex() for pixel in row] for row in pixels]
    assert colours == [[viridis(value) for value in row] for row in levels]


def test_colour_bar() -> None:
    texts = [text.text for text in parse(colour_bar("magnitude", "≤ 0.1", "≥ 4")).iter("text")]
    assert texts == ["magnitude", "≤ 0.1", "≥ 4"]
