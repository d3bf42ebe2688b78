"""Compare methods at the same FFN bytes: ask for another sparsity until what is read is what was meant."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from rows import Row

from tda_export.errors import TdaError, UsageError

MOST_TRIES = 5
FLATTEST = -0.2  # points of bytes for a point of sparsity: what the secant is believed to be at the least


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
        slope = min((missed - missed_before) / (asked - before), FLATTEST)
    return min(max(asked - missed / slope, 0.0), 0.95)


def at_same_bytes(cell: Cell, within: float, measure: Callable[[Cell], Row], *, first: float | None = None) -> Row:
    """Measure a cell until it misses its bytes by at most `within`, or MOST_TRIES times.

    Args:
        cell: What shall be measured.
        within: Share of the dense FFN bytes.
        measure: Given the cell with the sparsity to ask for, returns a row; of what it has, `ffn_share` is used.
        first: The sparsity to ask for first, where it is known to be better than the cell's own.

    Returns:
        The row that misses least, with `method`, `sparsity` (the cell's), `asked`, `within` and `miss`. A method that
        refuses the next sparsity keeps the best that it has.

    Raises:
        UsageError: It refuses the first.
    """
    tried: list[Row] = []
    asked = cell.sparsity if first is None else first
    for _ in range(MOST_TRIES):
        try:
            row = measure(Cell(cell.method, asked))
        except UsageError:
            if not tried:
                raise
            break
        row |= {"method": cell.method, "sparsity": cell.sparsity, "asked": asked, "within": within}
        tried.append(row | {"miss": miss(row)})
        if abs(tried[-1]["miss"]) <= within:
            break
        asked = next_asked([(row["asked"], row["miss"]) for row in tried])
    return min(tried, key=lambda row: abs(row["miss"]))


def kl_at(points: Sequence[tuple[float, float]], share: float) -> float | None:
    """Interpolate the KL at a share of bytes between two settings: its logarithm is taken as linear in the share.

    Args:
        points: Of settings of one method: share of bytes that was read, KL.
        share: Of bytes.

    Returns:
        None where no setting read less, or none more.
    """
    below = [point for point in points if point[0] <= share]
    above = [point for point in points if point[0] >= share]
    if not below or not above:
        return None
    (low, kl_low), (high, kl_high) = max(below), min(above)
    if low == high:
        return kl_low
    if min(kl_low, kl_high) <= 0:
        return kl_low + (kl_high - kl_low) * (share - low) / (high - low)
    weight = (share - low) / (high - low)
    return math.exp((1 - weight) * math.log(kl_low) + weight * math.log(kl_high))


def require_same_bytes(rows: Iterable[Row]) -> None:
    """Fail where rows miss their bytes.

    Raises:
        TdaError: Says which.
    """
    missed = [f"{row['method']} at {row['sparsity']:g}" for row in rows if abs(row["miss"]) > row["within"]]
    if missed:
        raise TdaError(f"These read other bytes than was meant, see 'miss': {', '.join(missed)}.")
