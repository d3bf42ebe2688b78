"""Tables of prices: interpolation between measured rows, and refusals."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tda_export.errors import UsageError
from tda_export.pricing import PriceRow, PriceTable, ShortPrompts


def row(price: float, share: float, kl: float) -> PriceRow:
    parts = dict.fromkeys(("q", "k", "v", "o", "up", "down"), share)
    return PriceRow(price, share, share, share, parts, kl, kl / 10, 1 - kl / (1 + kl))


DENSE, FIRST, LAST = row(0.0, 1.0, 0.0), row(1e-9, 0.9, 0.001), row(1e-7, 0.5, 0.1)
TABLE = PriceTable("separate", 4, 128, (DENSE, FIRST, LAST))


@st.composite
def tables(draw: st.DrawFn) -> PriceTable:
    """Draw tables like measured ones: prices rise, other columns rise up to noise, and dense ReLU reads less than 1."""
    count = draw(st.integers(1, 6))
    steps = draw(st.lists(st.floats(0.05, 3), min_size=count, max_size=count))
    prices = [math.exp(sum(steps[: i + 1]) - 20) for i in range(count)]
    dense = draw(st.floats(0.5, 1.0))
    shares = draw(st.lists(st.floats(0.05, 1.0), min_size=count, max_size=count))
    kls = draw(st.lists(st.one_of(st.just(0.0), st.floats(1e-8, 5)), min_size=count, max_size=count))
    rows = zip(prices, sorted(shares, reverse=draw(st.booleans())), sorted(kls), strict=True)
    return PriceTable("sites", 4, 128, (row(0.0, dense, 0.0), *(row(p, dense * s, k) for p, s, k in rows)))


# By hand


def test_between_dense_and_the_first_row() -> None:
    """The skipped fraction is proportional to the root of the price, KL to its power 1.5."""
    middle = TABLE.predicted(0.25e-9)
    assert middle.share == pytest.approx(1 - 0.1 * 0.5)
    assert middle.kl == pytest.approx(0.001 / 8)
    assert TABLE.price_for(sparsity=0.05) == pytest.approx(0.25e-9)
    assert TABLE.price_for(max_kl=0.001 / 8) == pytest.approx(0.25e-9)


def test_between_two_rows() -> None:
    """Fractions are linear in the logarithm of the price, KL is a power of the price."""
    middle = TABLE.predicted(1e-8)
    assert middle.share == pytest.approx(0.7)
    assert middle.parts["down"] == pytest.approx(0.7)
    assert middle.kl == pytest.approx(0.01)
    assert middle.sparsity == pytest.approx(0.3)
    assert TABLE.price_for(sparsity=0.3) == pytest.approx(1e-8)
    assert TABLE.price_for(max_kl=0.01) == pytest.approx(1e-8)


def test_dense() -> None:
    for price in (0.0, -1.0):
        assert TABLE.predicted(price) == DENSE
    assert TABLE.price_for(sparsity=0.0) == 0.0


def test_dense_of_relu_meets_a_sparsity() -> None:
    table = PriceTable("separate", 4, 128, (row(0.0, 0.7, 0.0), row(1e-9, 0.6, 0.01)))
    assert table.price_for(sparsity=0.3) == table.price_for(sparsity=0.1) == 0.0
    assert 0 < table.price_for(sparsity=0.31) < 1e-9


# Properties


@given(tables(), st.integers(0, 6))
def test_measured_rows_are_predicted(table: PriceTable, index: int) -> None:
    measured = table.rows[index % len(table.rows)]
    predicted = table.predicted(measured.price)
    assert predicted.share <= measured.share + 1e-12  # smaller only where noise had raised it
    assert predicted.kl >= measured.kl - 1e-12
    assert predicted.agreement == pytest.approx(measured.agreement)
    shares, kls = [r.share for r in table.rows], [r.kl for r in table.rows]
    if shares == sorted(shares, reverse=True) and kls == sorted(kls):
        assert (predicted.share, predicted.kl) == pytest.approx((measured.share, measured.kl))


@given(tables(), st.floats(0, 1), st.floats(0, 1))
def test_dearer_reads_less_and_loses_more(table: PriceTable, one: float, other: float) -> None:
    low, high = sorted((one * table.most_price, other * table.most_price))
    cheap, dear = table.predicted(low), table.predicted(high)
    assert dear.share <= cheap.share + 1e-12
    assert dear.kl >= cheap.kl - 1e-12


@given(tables(), st.floats(0, 1))
def test_a_sparsity_is_met(table: PriceTable, part: float) -> None:
    """Any measured sparsity can be asked for, and the price is no higher than needed."""
    sparsity = part * (1 - table.least_share)
    price = table.price_for(sparsity=sparsity)
    assert 0 <= price <= table.most_price
    expected = min(1 - sparsity, table.rows[0].share)
    assert table.predicted(price).share == pytest.approx(expected, abs=1e-6)


@given(tables(), st.floats(1e-6, 1))
def test_a_kl_is_kept(table: PriceTable, part: float) -> None:
    max_kl = part * table.most_kl
    if max_kl == 0:
        return
    price = table.price_for(max_kl=max_kl)
    assert 0 <= price <= table.most_price
    assert table.predicted(price).kl == pytest.approx(max_kl, rel=1e-6)


@given(tables(), st.integers(1, 8), st.floats(0, 1))
def test_rescaling_keeps_what_is_read(table: PriceTable, element_bytes: int, part: float) -> None:
    """If rows take half the bytes, the same rows are read at twice the price of a byte."""
    other = table.rescaled(element_bytes)
    price = part * table.most_price
    factor = table.element_bytes / element_bytes
    scaled = min(price * factor, other.most_price)
    assert other.predicted(scaled).share == pytest.approx(table.predicted(price).share, abs=1e-6)
    assert other.element_bytes == element_bytes
    back = other.rescaled(table.element_bytes)
    assert [r.price for r in back.rows] == pytest.approx([r.price for r in table.rows])


@given(tables())
def test_plain_data_round_trip(table: PriceTable) -> None:
    assert PriceTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table


@given(tables())
def test_limits_may_be_asked_for(table: PriceTable) -> None:
    assert table.price_for(sparsity=max(0.0, table.most_sparsity)) <= table.most_price
    if table.most_kl > 0:
        assert table.price_for(max_kl=table.most_kl) <= table.most_price


# Refusals


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        ({"sparsity": 0.6}, r"^Sparsity 0\.6 is more than was measured with prices \(0\.500, at KL 0\.1 to dense\)\. "
         r"Give a sparsity up to 0\.5\.$"),
        ({"sparsity": 1.0}, r"^sparsity 1\.0 is outside \[0, 1\)\. Give a fraction such as 0\.3\.$"),
        ({"sparsity": math.nan}, r"^sparsity nan is outside"),
        ({"max_kl": 0.2}, r"^KL 0\.2 is more than was measured with prices \(0\.1, at sparsity 0\.500\)\. "
         r"Give a KL up to 0\.1\.$"),
        ({"max_kl": 0.0}, r"^--max-kl 0\.0: give a positive number of nats a token, such as 0\.05\.$"),
        ({"max_kl": math.nan}, r"^--max-kl nan: give a positive"),
        ({}, r"^A price is chosen by a sparsity or by a KL\. Give exactly one\.$"),
        ({"sparsity": 0.3, "max_kl": 0.05}, r"^A price is chosen by a sparsity or by a KL\. Give exactly one\.$"),
    ],
)  # fmt: skip
def test_budgets_that_are_refused(budget: dict[str, float], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        TABLE.price_for(**budget)


@pytest.mark.parametrize("price", [1.1e-7, math.inf, math.nan])
def test_prices_that_are_refused(price: float) -> None:
    with pytest.raises(UsageError, match=r"is beyond what was measured: up to 1e-07, which leaves 0\.500 of the bytes"):
        TABLE.predicted(price)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda content: content.update(packing="pairs"), "packing 'pairs' is not known"),
        (lambda content: content.update(element_bytes=0), "sizes are not positive"),
        (lambda content: content.update(rows=content["rows"][:1]), "fewer than two rows"),
        (lambda content: content["rows"].pop(0), "the first row is not dense"),
        (lambda content: content["rows"].reverse(), "the first row is not dense"),
        (lambda content: content["rows"][2].update(price=1e-10), "prices do not rise"),
        (lambda content: content["rows"][1].update(share=1.2), r"a share is outside \[0, 1\]"),
        (lambda content: content["rows"][1]["parts"].update(q=-0.1), r"a share is outside \[0, 1\]"),
        (lambda content: content["rows"][1].update(kl=-0.1), "a KL is negative"),
        (lambda content: content["rows"][1].update(kl=math.nan), "a number is not finite"),
        (lambda content: content["rows"][1]["parts"].update(x=0.5), "rows are of different parts"),
        (lambda content: content["rows"][1].pop("kl"), "incomplete"),
        (lambda content: content.pop("rows"), "incomplete"),
        (lambda content: content.update(rows=[1, 2]), "incomplete"),
        (lambda content: content["rows"][1].update(parts=None), "incomplete"),
        (lambda content: content["rows"][1].update(price="dear"), "could not convert"),
    ],
)
def test_content_that_is_no_table(change: Any, text: str) -> None:
    content = json.loads(json.dumps(TABLE.to_dict()))
    change(content)
    with pytest.raises(ValueError, match=text):
        PriceTable.from_dict(content)


def test_rescaling_to_nothing() -> None:
    with pytest.raises(ValueError, match="sizes are not positive"):
        TABLE.rescaled(0)


def test_a_row_that_noise_raised_does_not_count() -> None:
    rows = (*TABLE.rows[:2], dataclasses.replace(row(1e-8, 0.95, 0.0005)), LAST)
    table = PriceTable("separate", 4, 128, rows)
    assert table.predicted(1e-8).share == 0.9
    assert table.predicted(1e-8).kl == 0.001


# Short prompts

SHORT = ShortPrompts(32, 256, (0.0, 0.002, 0.14), (0.0, 0.0004, 0.014))
BOTH = dataclasses.replace(TABLE, short=SHORT)


def test_between_two_lengths_of_prompt() -> None:
    """Halfway between the logarithms of the lengths, the KL is the geometric mean. The price for a KL agrees."""
    middle = BOTH.after(round(math.sqrt(32 * 256)))
    assert middle.rows[1].kl == pytest.approx(math.sqrt(0.001 * 0.002), rel=1e-2)
    assert middle.rows[2].kl == pytest.approx(math.sqrt(0.1 * 0.14), rel=1e-2)
    assert middle.rows[2].kl_stderr == pytest.approx((0.01 + 0.014) / 2, rel=1e-2)
    assert middle.price_for(max_kl=middle.rows[1].kl) == pytest.approx(1e-9)
    assert BOTH.after(32).price_for(max_kl=0.14) == pytest.approx(1e-7)
    assert BOTH.after(32).price_for(max_kl=0.05) < BOTH.price_for(max_kl=0.05)


@given(st.integers(0, 10**6))
def test_a_length_of_prompt_changes_nothing_but_the_kl(prompt_tokens: int) -> None:
    found = BOTH.after(prompt_tokens)
    for row, own, short in zip(found.rows, BOTH.rows, SHORT.kl, strict=True):
        assert own.kl <= row.kl <= short or row.kl == pytest.approx(short)
        assert dataclasses.replace(row, kl=own.kl, kl_stderr=own.kl_stderr) == own
    if prompt_tokens >= 256:
        assert found == BOTH
    if prompt_tokens <= 32:
        assert [row.kl for row in found.rows] == pytest.approx(list(SHORT.kl))


def test_a_table_of_one_length_predicts_the_same_after_every_prompt() -> None:
    assert TABLE.after(1) == TABLE
    assert TABLE.short_kl_texts == [[], [], []]
    assert BOTH.short_kl_texts == [["0.0000"], ["0.0020"], ["0.1400"]]


def test_short_prompts_survive_a_file() -> None:
    content = json.loads(json.dumps(BOTH.to_dict()))
    assert PriceTable.from_dict(content) == BOTH
    assert PriceTable.from_dict(content).rescaled(2).short == SHORT
    del content["short"]
    assert PriceTable.from_dict(content) == TABLE


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"prompt_tokens": 256}, "short prompts are not shorter than its own"),
        ({"prompt_tokens": 0}, "short prompts are not shorter than its own"),
        ({"kl": (0.0, 0.1)}, "the KL after short prompts is not of every row"),
        ({"kl": (0.0, 0.1, -0.1)}, "a KL after short prompts is negative or not finite"),
        ({"kl_stderr": (0.0, math.nan, 0.1)}, "a KL after short prompts is negative or not finite"),
    ],
)
def test_short_prompts_that_cannot_be(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        dataclasses.replace(TABLE, short=dataclasses.replace(SHORT, **change))
    content = BOTH.to_dict()
    content["short"] |= change
    with pytest.raises(ValueError, match=problem):
        PriceTable.from_dict(content)
