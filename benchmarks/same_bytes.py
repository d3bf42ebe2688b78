"""Compare methods at the same FFN bytes: ask for another sparsity until what is read is what was meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from rows import Row

MOST_TRIES = 5


class Cell(NamedTuple):
    """A method and the share of FFN bytes that it shall not read; None for what chooses its own."""

    method: str
    sparsity: float | None = None


def miss(row: Row) -> float:
    """How much more was read than the sparsity of the row's cell allows, as a share of dense."""
    return 0.0 if row["sparsity"] is None else float(row["ffn_share"]) - (1 - row["sparsity"])


def next_asked(tried: list[tuple[float, float]]) -> float:
    """The sparsity to ask for next: (asked, miss) of earlier tries, by the secant through the last two.

    The first step takes a point of bytes for a point of sparsity.
    """
    asked, missed = tried[-1]
    slope = -1.0
    if len(tried) > 1 and tried[-2][0] != asked:
        before, missed_before = tried[-2]
        slope = (missed - missed_before) / (asked - before)
    return min(max(asked - missed / slope, 0.0), 0.95) if slope else asked


def at_same_bytes(
    cells: list[Cell],
    within: float,
    measure: Callable[[list[Cell]], list[Row]],
    *,
    first: float | None = None,
) -> list[Row]:
    """Measure cells until each misses its bytes by at most `within`, or MOST_TRIES times.

    Args:
        cells: What shall be measured.
        within: Share of the dense FFN bytes.
        measure: Given cells with the sparsities to ask for, returns their rows; of what a row has, `ffn_share` is used.
        first: The sparsity to ask for first, where it is known to be better than a cell's own.

    Returns:
        Of each cell the row that misses least, with `method`, `sparsity` (the cell's) and `asked`.
    """
    tried: dict[Cell, list[Row]] = {cell: [] for cell in cells}
    asked = {cell: cell.sparsity if first is None else first for cell in cells}
    for _ in range(MOST_TRIES):
        rows = measure([Cell(cell.method, sparsity) for cell, sparsity in asked.items()])
        for (cell, sparsity), row in zip(asked.items(), rows, strict=True):
            tried[cell].append(row | {"method": cell.method, "sparsity": cell.sparsity, "asked": sparsity})
        asked = {
            cell: next_asked([(row["asked"], miss(row)) for row in tried[cell]])
            for cell in asked
            if abs(miss(tried[cell][-1])) > within
        }
        if not asked:
            break
    return [min(rows, key=lambda row: abs(miss(row))) for rows in tried.values()]
