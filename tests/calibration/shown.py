"""Progress that tests can look at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from tda_export.progress import Advance


class Shown:
    """Stands in for progress bars: what was shown, of how many units, and how many came."""

    def __init__(self) -> None:
        self.bars: list[list[Any]] = []

    @contextlib.contextmanager
    def __call__(self, description: str, units: int) -> Iterator[Advance]:
        bar = [description, units, 0]
        self.bars.append(bar)

        def advance(count: int) -> None:
            bar[2] += count

        yield advance
