"""Tables of prices: the choice of prices, and the bytes and KL of each against sums by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tda_export.calibration.magnitudes import ALL_BINS, float_bins
from tda_export.calibration.price_table import SHARES, Measured, choose_prices, measure_sequence, prices_at
from tda_export.calibration.prices import no_prices, price_continuation, read_prompt, sampled_labels
from tda_export.errors import TdaError
from tda_export.models.spec import DecoderSpec
from tda_export.packing import PACKINGS, RowBytes, linear_parts, linear_shape, packed_matrices
from tests.linears_by_hand import by_hand, patched

Family = Callable[[str], tuple[Any, DecoderSpec]]
PROMPT, CONTINUATION = 10, 6


def draw_tokens(spec: DecoderSpec, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(3, spec.vocab_size, (count, PROMPT + CONTINUATION), generator=generator)


def row_prices_of(model: Any, spec: DecoderSpec, tokens: torch.Tensor) -> dict[Any, dict[str, torch.Tensor]]:
    sums = no_prices(spec)
    for index, sequence in enumerate(tokens):
        cache = read_prompt(model, sequence[:PROMPT])
        sums = sums + price_continuation(model, spec, cache, sequence[PROMPT:], sampled_labels(1, 0, index))
    return {packing: sums.row_prices(spec, packing, RowBytes(4)) for packing in PACKINGS}


def shapes(spec: DecoderSpec) -> dict[str, tuple[int, int]]:
    return {part: linear_shape(spec, part) for part in linear_parts(spec)}


# The choice of prices


@given(st.integers(0, 2**32), st.lists(st.floats(0.01, 0.99), min_size=1, max_size=8, unique=True))
def test_prices_leave_their_shares(seed: int, shares: list[float]) -> None:
    generator = torch.Generator().manual_seed(seed)
    worth = 10 ** (6 * torch.rand(20_000, generator=generator) - 12)
    histogram = torch.bincount(float_bins(worth), minlength=ALL_BINS).double()
    wanted = tuple(sorted(shares, reverse=True))
    prices = prices_at(histogram, wanted)
    assert prices == sorted(set(prices))
    for price, share in zip(prices, wanted, strict=False):
        if len(prices) == len(wanted):
            assert float((worth >= price).double().mean()) == pytest.approx(share, abs=2e-3)


def test_rows_that_are_worth_nothing_do_not_count() -> None:
    """With ReLU's zeros, shares are relative to the rows that dense reads."""
    worth = torch.cat([torch.zeros(3000), torch.linspace(1e-6, 1e-5, 1000)])
    histogram = torch.bincount(float_bins(worth), minlength=ALL_BINS).double()
    (price,) = prices_at(histogram, (0.5,))
    assert price == pytest.approx(5.5e-6, rel=0.02)


def test_nothing_is_worth_anything() -> None:
    assert prices_at(torch.zeros(ALL_BINS, dtype=torch.float64), SHARES) == []


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_chosen_prices_leave_their_shares_of_dense_inputs(family: Family, name: str) -> None:
    """The count is on dense inputs, like the choice."""
    model, spec = family(name)
    tokens = draw_tokens(spec, 2)
    row_prices = row_prices_of(model, spec, tokens)
    chosen = choose_prices(model, spec, tokens, PROMPT, row_prices, RowBytes(4))
    inputs: list[tuple[int, str, torch.Tensor]] = []

    def see(layer: int, part: str, x: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        inputs.append((layer, part, x))
        return outputs

    for sequence in tokens:
        cache = read_prompt(model, sequence[:PROMPT])
        with torch.no_grad(), patched(model, spec, see):
            model(sequence[None, PROMPT:], past_key_values=cache, use_cache=True)
    for packing in PACKINGS:
        matrix = {part: name for name, parts in packed_matrices(spec, packing).items() for part in parts}
        worth = [x.square() * row_prices[packing][matrix[part]][layer] for layer, part, x in inputs]
        columns = [linear_shape(spec, part)[1] for _, part, _ in inputs]
        whole = sum(size * int((values > 0).sum()) for size, values in zip(columns, worth, strict=True))
        for price, share in zip(chosen[packing], SHARES, strict=True):
            read = sum(size * int((values >= price).sum()) for size, values in zip(columns, worth, strict=True))
            assert read / whole == pytest.approx(share, abs=0.01)


# Bytes and KL


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "opt"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_bytes_and_kl_by_hand(family: Family, name: str, packing: Any) -> None:
    """Compute one call of the whole sequence row by row; the prompt reads every row."""
    model, spec = family(name)
    tokens = draw_tokens(spec, 4)
    row_prices = row_prices_of(model, spec, tokens[::2])[packing]
    price = choose_prices(model, spec, tokens[::2], PROMPT, {packing: row_prices}, RowBytes(4))[packing][6]
    measured = Measured.begin(spec, [price])
    done: list[int] = []
    for sequence in tokens[1::2]:
        measure_sequence(model, spec, sequence, PROMPT, {packing: row_prices}, {packing: measured}, done.append)
    table = measured.table(shapes(spec), packing, RowBytes(4), CONTINUATION)
    assert done == [1] * 4
    assert (table.packing, table.element_bytes, table.continuation_tokens) == (packing, 4, CONTINUATION)

    kls: list[torch.Tensor] = []
    agreements: list[torch.Tensor] = []
    read: dict[str, float] = {}
    dense_read: dict[str, float] = {}
    matrix = {part: name for name, parts in packed_matrices(spec, packing).items() for part in parts}

    def own(layer: int, part: str, x: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        weight = by_hand(model, spec, layer, part)[1]
        kept = ~(x.square() * row_prices[matrix[part]][layer] < price)
        kept[:PROMPT] = True
        read[part] = read.get(part, 0.0) + float((kept & (x != 0))[PROMPT:].sum())
        return outputs - torch.where(kept, 0, x) @ weight

    def see(layer: int, part: str, x: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        dense_read[part] = dense_read.get(part, 0.0) + float((x != 0)[PROMPT:].sum())
        return outputs

    for sequence in tokens[1::2]:
        with torch.no_grad():
            with patched(model, spec, see):
                dense = model(sequence[None]).logits[0, PROMPT:].log_softmax(dim=-1)
            with patched(model, spec, own):
                sparse = model(sequence[None]).logits[0, PROMPT:].log_softmax(dim=-1)
        kls.append((dense.exp() * (dense - sparse)).sum(dim=-1).mean())
        agreements.append((dense.argmax(dim=-1) == sparse.argmax(dim=-1)).double().mean())
    first, row = table.rows
    assert (first.price, first.kl, first.agreement) == (0.0, 0.0, 1.0)
    assert row.price == pytest.approx(price)
    assert row.kl == pytest.approx(float(torch.stack(kls).mean()), rel=0.02)
    assert row.kl_stderr == pytest.approx(float(torch.stack(kls).std() / 2**0.5), rel=0.1)
    assert row.agreement == pytest.approx(float(torch.stack(agreements).mean()))
    rows_of_all = 2 * CONTINUATION * spec.num_layers
    for part, (inputs, _) in shapes(spec).items():
        assert row.parts[part] == pytest.approx(read[part] / (rows_of_all * inputs), abs=0.005)
        assert first.parts[part] == pytest.approx(dense_read[part] / (rows_of_all * inputs))
    for share, parts in (
        ("share", linear_parts(spec)),
        ("ffn_share", spec.ffn_parts),
        ("attention_share", ("q", "k", "v", "o")),
    ):
        size = {part: 4 * shapes(spec)[part][1] * shapes(spec)[part][0] for part in parts}
        expected = sum(row.parts[part] * size[part] for part in parts) / sum(size.values())
        assert getattr(row, share) == pytest.approx(expected), share
    assert (first.share < 0.95) == (name == "opt")  # ReLU's zeros


def test_sparser_is_worse(family: Family) -> None:
    model, spec = family("llama")
    tokens = draw_tokens(spec, 4)
    row_prices = row_prices_of(model, spec, tokens[::2])
    chosen = choose_prices(model, spec, tokens[::2], PROMPT, row_prices, RowBytes(4))
    measured = {packing: Measured.begin(spec, prices) for packing, prices in chosen.items()}
    for sequence in tokens[1::2]:
        measure_sequence(model, spec, sequence, PROMPT, row_prices, measured)
    for packing in PACKINGS:
        rows = measured[packing].table(shapes(spec), packing, RowBytes(4), CONTINUATION).rows
        assert len(rows) == 1 + len(SHARES)
        shares = [row.share for row in rows]
        assert shares == sorted(shares, reverse=True)
        assert shares[1] == pytest.approx(SHARES[0], abs=0.05)
        assert rows[-1].kl > rows[len(rows) // 2].kl > rows[1].kl


def test_an_interrupted_sequence_is_not_counted(family: Family) -> None:
    model, spec = family("llama")
    tokens = draw_tokens(spec, 2)
    row_prices = row_prices_of(model, spec, tokens[:1])
    chosen = choose_prices(model, spec, tokens[:1], PROMPT, row_prices, RowBytes(4))
    measured = {packing: Measured.begin(spec, prices) for packing, prices in chosen.items()}
    before = copy.deepcopy(measured)
    calls = 0

    def interrupt(units: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 15:  # within the second packing
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_sequence(model, spec, tokens[1], PROMPT, row_prices, measured, interrupt)
    for packing in PACKINGS:
        assert len(measured[packing].kl) == measured[packing].tokens == 0
        assert all(torch.equal(read, before[packing].read[part]) for part, read in measured[packing].read.items())


def test_logits_that_are_not_finite(family: Family) -> None:
    """Their KL must not become 0."""
    model, spec = family("llama")
    tokens = draw_tokens(spec, 1)
    prices = row_prices_of(model, spec, tokens)["sites"]
    broken = copy.deepcopy(model)
    broken.model.norm.weight.data[0] = float("nan")
    measured = Measured.begin(spec, [1e-30])
    with pytest.raises(TdaError, match=r"^Logits are not finite\. Calibrate with --dtype bf16 or fp32\.$"):
        measure_sequence(broken, spec, tokens[0], PROMPT, {"sites": prices}, {"sites": measured})


def test_a_model_whose_rows_do_nothing(family: Family) -> None:
    model, spec = family("llama")
    tokens = draw_tokens(spec, 1)
    none = {name: torch.zeros_like(value) for name, value in row_prices_of(model, spec, tokens)["sites"].items()}
    with pytest.raises(TdaError, match=r"^All rows have the price 0: the model's output does not depend on its layers"):
        choose_prices(model, spec, tokens, PROMPT, {"sites": none}, RowBytes(4))


def test_one_sequence_has_no_standard_error(family: Family) -> None:
    model, spec = family("llama")
    tokens = draw_tokens(spec, 1)
    measured = Measured.begin(spec, [1e-30])
    prices = row_prices_of(model, spec, tokens)["separate"]
    measure_sequence(model, spec, tokens[0], PROMPT, {"separate": prices}, {"separate": measured})
    row = measured.table(shapes(spec), "separate", RowBytes(4), CONTINUATION).rows[1]
    assert (row.kl_stderr, row.share) == (0.0, 1.0)
