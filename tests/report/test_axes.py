"""Axes: places of values, and round ticks within the range."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tda_export.report.axes import Axis, around, plain
from tests.report.svg import tick_value


def test_linear_places() -> None:
    axis = Axis("x", 2.0, 4.0)
    assert [axis.place(value) for value in (2.0, 2.5, 4.0, 9.0, -1.0)] == [0.0, 0.25, 1.0, 1.0, 0.0]


def test_logarithmic_places() -> None:
    axis = Axis("x", 1e-4, 1.0, log=True)
    assert [axis.place(value) for value in (1e-4, 1e-3, 1e-2, 1.0)] == pytest.approx([0.0, 0.25, 0.5, 1.0])
    assert axis.place(0.0) == 0.0  # below the range


@pytest.mark.parametrize(("low", "high", "log"), [(1.0, 1.0, False), (0.0, math.inf, False), (0.0, 1.0, True)])
def test_no_range(low: float, high: float, log: bool) -> None:
    with pytest.raises(ValueError, match="Axis 'x'"):
        Axis("x", low, high, log)


@example([17391305.0, 0.0625], True)
@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=6), st.booleans())
def test_around_holds_all_values_between_ticks(values: list[float], log: bool) -> None:
    axis = around("x", values, log=log)
    slack = 1e-8 * (axis.high - axis.low)
    assert axis.low - slack <= min(values) <= max(values) <= axis.high + slack
    ticks = axis.ticks()
    assert ticks == sorted(set(ticks))
    assert 2 <= len(ticks) <= 20
    room = 0.0 if log else slack
    assert all(axis.low * (1 - 1e-9) - room <= tick <= axis.high * (1 + 1e-9) + room for tick in ticks)


def test_around_leaves_out_what_has_no_place() -> None:
    axis = around("x", [0.0, -1.0, math.nan, math.inf, 0.1, 0.2], log=True)
    assert 0.05 <= axis.low <= 0.1 < 0.2 <= axis.high <= 0.5
    assert around("x", [math.nan]).low < around("x", []).high
    assert around("x", [3.0, 4.0], zero=True).low == 0.0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.05, "0.05"), (20.0, "20"), (1e-5, "10⁻⁵"), (2e-5, "2·10⁻⁵"), (1e6, "10⁶"), (0.001, "0.001")],
)
def test_plain(value: float, text: str) -> None:
    assert plain(value) == text
    assert tick_value(text) == pytest.approx(value)
