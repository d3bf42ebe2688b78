"""Axes: they map values to places between 0 and 1, and choose ticks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
TICKS = 6


def plain(value: float) -> str:
    """Write a tick's number: 0.05, 20, and 10⁻⁵ where it is shorter."""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    if -4 < exponent < 5:
        return f"{value:.10f}".rstrip("0").rstrip(".")
    digits = f"{value / 10.0**exponent:.3g}"
    return ("" if digits == "1" else f"{digits}·") + f"10{str(exponent).translate(SUPERSCRIPTS)}"


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis from `low` to `high`; `label` names the quantity and its unit."""

    label: str
    low: float
    high: float
    log: bool = False
    write: Callable[[float], str] = plain

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"Axis {self.label!r}: {self.low} to {self.high} is not a range.")
        if self.log and self.low <= 0:
            raise ValueError(f"Axis {self.label!r}: a logarithm needs values above 0, not {self.low}.")

    def place(self, value: float) -> float:
        """Return where a value lies: 0 at `low`, 1 at `high`; values outside go to the nearer end."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Return round values within the range, ascending."""
        candidates = _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)
        if self.log:
            return [value for value in candidates if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)]
        slack = 1e-9 * (self.high - self.low)
        return [value for value in candidates if self.low - slack <= value <= self.high + slack]


def around(label: str, values: Iterable[float], *, log: bool = False, zero: bool = False) -> Axis:
    """Make an axis between round numbers that holds all values with a little room.

    Args:
        label: The quantity and its unit.
        values: The values; those that are not finite, or not positive on a logarithmic axis, are ignored.
        log: Whether the axis is logarithmic.
        zero: Whether a linear axis begins at 0.
    """
    kept = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    low, high = (min(kept), max(kept)) if kept else (0.1, 1.0)
    if log:
        return Axis(label, _round_log(low / 1.15, up=False), _round_log(high * 1.15, up=True), log)
    low = min(low, 0.0) if zero else low
    if high - low < 1e-9 * max(abs(high), abs(low), 1e-300):
        room = (abs(high) or 1.0) / 2
        low, high = (low if zero else low - room), high + room
    for _ in range(2):  # a wider range may need wider steps
        step = _step(low, high)
        low, high = _multiple(math.floor(low / step + 1e-9), step), _multiple(math.ceil(high / step - 1e-9), step)
    return Axis(label, low, high)


def _round_log(value: float, *, up: bool) -> float:
    """Return the next of 1, 2, 5 times a power of ten that is at least (up) or at most `value`."""
    power = math.floor(math.log10(value))
    candidates = [factor * 10.0**exponent for exponent in (power - 1, power, power + 1) for factor in (1, 2, 5)]
    candidates.append(10.0 ** (power + 2))
    return min(c for c in candidates if c >= value) if up else max(c for c in candidates if c <= value)


def _step(low: float, high: float) -> float:
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10, 20) if factor * power >= rough * (1 - 1e-9))


def _multiple(count: int, step: float) -> float:
    """Return `count` times `step`, without rounding noise in the last binary digits."""
    return round(count * step, 12 - math.floor(math.log10(step)))


def _linear_ticks(low: float, high: float) -> list[float]:
    step = _step(low, high)
    return [_multiple(count, step) for count in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = math.log10(high / low)
    factors = (1, 2, 3, 5) if decades < 1.5 else (1, 2, 5) if decades < 3 else (1,)
    every = max(1, math.ceil(decades / 8))
    powers = range(first, last + 1)
    return [factor * 10.0**power for power in powers if power % every == 0 for factor in factors]
