"""Progress that tests can inspect."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from tda_export.progress import Advance


class Shown:
    """Replaces progress bars, and records the description, the number of units, and the units finished of each."""

    def __init__(self) -> None:
        self.bars: list[list[Any]] = []

    @contextlib.contextmanager
    def __call__(self, description: str, units: int) -> Iterator[Advance]:
        bar = [description, units, 0]
        self.bars.append(bar)

        def advance(count: int) -> None:
            bar[2] += count

        yield advance
