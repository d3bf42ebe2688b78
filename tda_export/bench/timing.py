"""Time several methods in turns, so that a busy moment of the machine affects all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """A median with its spread; the unit is the caller's."""

    median: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


def take_turns(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Run each call once per round, and return the seconds of all `rounds` runs, by name.

    Every other round runs in reverse order, so that no method always follows the same other one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name, call in reversed(list(calls.items())) if number % 2 else calls.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def speedup(baseline: Sequence[float], other: Sequence[float]) -> Spread:
    """Compare round by round: how many times faster `other` was than `baseline` in the same round."""
    return Spread.of([slow / fast for slow, fast in zip(baseline, other, strict=True)])
