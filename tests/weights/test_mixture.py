"""The choice of int8 linears: its limit, its order, and refusals."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tda_export.errors import UsageError
from tda_export.weights.mixture import Mixture
from tda_export.weights.plan import FormatPlan, plan_formats, read_rules

PARTS = ("q", "k", "v", "o", "up", "down")
COLUMNS = {"q": 96, "k": 40, "v": 40, "o": 64, "up": 200, "down": 64}
ROWS = {"q": 64, "k": 64, "v": 64, "o": 96, "up": 64, "down": 200}


def mixture(bits: float = 6.0, rules: str = "", layers: int = 2, group: int = 32) -> Mixture:
    def plan(weights: str) -> FormatPlan:
        read = read_rules([rules], group) if rules else ()
        return plan_formats(layers, PARTS, tied_head=False, weights=weights, group=group, rules=read)

    shapes = {f"layers.{layer}.{part}": (ROWS[part], COLUMNS[part]) for layer in range(layers) for part in PARTS}
    return Mixture(plan("int4"), plan("int8"), shapes, bits)


def stored_bytes(found: Mixture, plan: FormatPlan) -> dict[str, int]:
    """Return the bytes by hand: codes, float16 scales, and zero points of each row."""
    sizes = {}
    for name, (rows, columns) in found.shapes.items():
        if (format := plan.integers.get(name)) is None:
            continue
        groups = -(-columns // format.group)
        packed = [-(-count * format.bits // 8) for count in (columns, groups)]
        sizes[name] = rows * (sum(packed) + 2 * groups)
    return sizes


@st.composite
def cases(draw: st.DrawFn) -> tuple[Mixture, dict[str, float]]:
    rules = draw(st.sampled_from(["", "layers.*.v=int8", "layers.0.*=int4_g64,head=int4", "layers.1.up=float"]))
    found = mixture(rules=rules, group=draw(st.sampled_from([32, 64, 128])))
    share = draw(st.floats(0, 1))
    least, most = (found.bits_per_weight(plan) for plan in (found.fours, found.eights))
    chosen = mixture(min(most, least + share * (most - least)), rules, group=int(found.open and group_of(found)))
    losses = draw(st.lists(st.floats(0, 1), min_size=len(found.open), max_size=len(found.open)))
    return chosen, dict(zip(found.open, losses, strict=True))


def group_of(found: Mixture) -> int:
    return found.fours.integers[found.open[0]].group


@given(case=cases())
def test_the_mean_is_at_most_what_was_asked_for_and_no_further_linear_fits(
    case: tuple[Mixture, dict[str, float]],
) -> None:
    found, losses = case
    found.check()
    plan = found.choose(losses)
    sizes, fours, eights = (stored_bytes(found, each) for each in (plan, found.fours, found.eights))
    weights = sum(rows * columns for name, (rows, columns) in found.shapes.items() if name in sizes)
    assert found.bits_per_weight(plan) == pytest.approx(8 * sum(sizes.values()) / weights)
    assert 8 * sum(sizes.values()) <= found.most_bits * weights * (1 + 1e-12)
    for name in found.open:
        if plan.of(name) == found.fours.of(name):
            assert 8 * (sum(sizes.values()) + eights[name] - fours[name]) > found.most_bits * weights * (1 - 1e-12)
        else:
            assert plan.of(name) == found.eights.of(name)
    for name, format in found.fours.formats.items():
        assert name in found.open or plan.of(name) == format


def one_of_two(first: float, second: float) -> tuple[Mixture, dict[str, float]]:
    """Return a case with two open linears of one size, their losses, and room for one of them."""
    rules = ",".join(f"layers.*.{part}=int4" for part in PARTS if part != "down")
    found = mixture(rules=rules)
    least, most = (found.bits_per_weight(plan) for plan in (found.fours, found.eights))
    return mixture(0.4 * least + 0.6 * most, rules), dict(zip(found.open, (first, second), strict=True))


@given(case=cases())
@example(case=one_of_two(0.0, 5e-324))  # a byte's share of the smallest number is 0
@example(case=one_of_two(math.nextafter(0.95, 0.0), 0.95))  # rounding makes the shares equal
def test_linears_of_one_size_are_taken_in_the_order_of_their_losses(case: tuple[Mixture, dict[str, float]]) -> None:
    found, losses = case
    plan = found.choose(losses)

    def pairs() -> Iterator[tuple[str, str]]:
        for part in PARTS:
            names = [name for name in found.open if name.endswith(f".{part}")]
            yield from ((one, other) for one in names for other in names if losses[one] > losses[other])

    for more, less in pairs():
        assert plan.of(more) == found.eights.of(more) or plan.of(less) == found.fours.of(less)


def test_a_byte_is_spent_where_it_saves_most() -> None:
    """k and up lose equally much, and k is smaller."""
    found = mixture()
    losses = dict.fromkeys(found.open, 0.0) | {"layers.0.up": 1.0, "layers.0.k": 1.0, "layers.1.k": 0.1}
    sizes, more = stored_bytes(found, found.fours), stored_bytes(found, found.eights)
    weights = sum(rows * columns for rows, columns in found.shapes.values())
    k, up = (more[name] - sizes[name] for name in ("layers.0.k", "layers.0.up"))
    for room, expected in ((k, {"layers.0.k"}), (k + up, {"layers.0.k", "layers.0.up"})):
        plan = mixture(8 * (sum(sizes.values()) + room) / weights).choose(losses)
        assert {name for name in found.open if plan.of(name) == found.eights.of(name)} == expected


@pytest.mark.parametrize("bits", [3.9, 9.5, 0.0, -1.0, float("nan"), float("inf")])
def test_bits_out_of_range(bits: float) -> None:
    least, most = (mixture().bits_per_weight(plan) for plan in (mixture().fours, mixture().eights))
    message = (
        rf"^--bits-per-weight {bits:g}: the linears take {least:.3f} bits a weight in int4 and {most:.3f} in int8, "
        r"scales and zero points included\. Give (\S+) to (\S+)\.$"
    )
    with pytest.raises(UsageError, match=message) as caught:
        mixture(bits).check()
    found = re.match(message, str(caught.value))
    assert found is not None
    for shown, limit in zip(found.groups(), (least, most), strict=True):
        mixture(float(shown)).check()
        assert float(shown) == pytest.approx(limit, abs=2e-3)


def test_nothing_to_choose() -> None:
    with pytest.raises(UsageError, match=r"^--bits-per-weight: --weights-for fixes the format of every linear, so"):
        mixture(rules="layers.*=int4").check()
