"""Compare methods at the same bytes, of the FFN or of all linears, by a search for the sparsity to ask for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from rows import Row

from tda_export.errors import TdaError, UsageError

MOST_TRIES = 5
FLATTEST = -0.2  # the smallest slope that the secant may have, in points of bytes for a point of sparsity


class Cell(NamedTuple):
    """A method and the fraction of bytes to skip; None for a method that chooses its own.

    `share`: the key of a row for the fraction that was read, `ffn_share` or `linear_share`.
    """

    method: str
    sparsity: float | None = None
    share: str = "ffn_share"


def miss(row: Row) -> float:
    """Return how many bytes more than the sparsity of the row's cell allows were read, as a fraction of dense."""
    return 0.0 if row["sparsity"] is None else float(row[row["share"]]) - (1 - row["sparsity"])


def next_asked(tried: list[tuple[float, float]]) -> float:
    """Return the sparsity to ask for next, by the secant through the last two of the earlier tries, (asked, miss) each.

    The first step assumes that a point of sparsity changes the bytes by a point.
    """
    asked, missed = tried[-1]
    slope = -1.0
    if len(tried) > 1 and tried[-2][0] != asked:
        before, missed_before = tried[-2]
        slope = min((missed - missed_before) / (asked - before), FLATTEST)
    return min(max(asked - missed / slope, 0.0), 0.95)


def at_same_bytes(
    cell: Cell, within: float, measure: Callable[[Cell], Row], *, first: float | None = None, between: bool = False
) -> Row:
    """Measure a cell until it misses its bytes by at most `within`, or MOST_TRIES times (two more with `between`).

    Args:
        cell: The cell to measure.
        within: The allowed miss, a fraction of the dense bytes.
        measure: Called with the cell and the sparsity to ask for; returns a row, which has the cell's share.
        first: The sparsity to ask for first, if a better one than the cell's own is known.
        between: Also measure on the other side of the bytes; rows then have a `kl`.

    Returns:
        The row that misses least, with `method`, `sparsity` and `share` (the cell's), `asked`, `within` and `miss`. If
        a method refuses the next sparsity, its best row so far counts. With `between`, `kl_at` is the KL at exactly
        these bytes, interpolated between two settings around them (None if there are none).

    Raises:
        UsageError: The method refuses the first sparsity.
    """
    tried: list[Row] = []
    asked = cell.sparsity if first is None else first
    for _ in range(MOST_TRIES + 2 * between):
        try:
            row = measure(cell._replace(sparsity=asked))
        except UsageError:
            if not tried:
                raise
            break
        row |= cell._asdict() | {"asked": asked, "within": within}
        tried.append(row | {"miss": miss(row)})
        misses = [row["miss"] for row in tried]
        near = min(map(abs, misses)) <= within
        if near and (not between or cell.sparsity is None or min(misses) <= 0 <= max(misses)):
            break
        asked = next_asked([(row["asked"], row["miss"]) for row in tried])
        if near:  # now measure on the other side of the bytes
            asked = min(max(asked + math.copysign(within, misses[-1]), 0.0), 0.95)
    best = min(tried, key=lambda row: abs(row["miss"]))
    if not between or cell.sparsity is None:
        return best
    return best | {"kl_at": kl_at([(row[cell.share], row["kl"]) for row in tried], 1 - cell.sparsity)}


def kl_at(points: Sequence[tuple[float, float]], share: float) -> float | None:
    """Interpolate the KL at a fraction of bytes between two settings. Its logarithm is taken as linear in the fraction.

    Args:
        points: The fraction of bytes read and the KL of each setting of one method.
        share: The fraction of bytes.

    Returns:
        The KL; None if no setting read less, or none read more.
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
    """Fail if rows miss their bytes.

    Raises:
        TdaError: Rows do; the message names them.
    """
    missed = [f"{row['method']} at {row['sparsity']:g}" for row in rows if abs(row["miss"]) > row["within"]]
    if missed:
        raise TdaError(f"These read other bytes than was meant, see 'miss': {', '.join(missed)}.")
