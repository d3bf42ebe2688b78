"""Dropping rows of linears in every family, against a loop over tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tda_export.models.row_dropping import dropping
from tda_export.models.spec import DecoderSpec
from tests.linears_by_hand import by_hand, patched, sites_of
from tests.tiny import FAMILIES

Family = Callable[[str], tuple[Any, DecoderSpec]]
TOKENS = torch.tensor([[5, 80, 33, 7, 120, 64, 9]])
PRICE = 0.2


def random_prices(spec: DecoderSpec, packing: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    prices = {}
    for site in sites_of(spec):
        size = {"o": spec.num_heads * spec.head_size, "down": spec.ffn_size}.get(site[0], spec.hidden_size)
        joined = "qkv" if "q" in site else "_".join(site)
        for name in site if packing == "separate" else (joined,):
            # Over four decades, so that every family reads some rows and skips some.
            prices[name] = 10 ** (4 * torch.rand(spec.num_layers, size, generator=generator) - 2)
    return prices


def price_of(prices: dict[str, torch.Tensor], part: str) -> torch.Tensor | None:
    site = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}.get(part, part)
    return prices.get(part, prices.get(site))


@pytest.mark.parametrize("packing", ["separate", "sites"])
@pytest.mark.parametrize("name", FAMILIES)
def test_like_a_loop_over_tokens(family: Family, name: str, packing: str) -> None:
    model, spec = family(name)
    prices = random_prices(spec, packing)
    read: dict[str, torch.Tensor] = {}

    def loop(layer: int, part: str, x: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        module, weight, columns = by_hand(model, spec, layer, part)
        row_price = price_of(prices, part)
        assert row_price is not None
        rows = []
        for token in x:
            kept = [i for i in range(len(token)) if not token[i] ** 2 * row_price[layer, i] < PRICE]
            rows.append(token[kept] @ weight[kept])
            read.setdefault(part, torch.zeros(spec.num_layers))[layer] += sum(bool(token[i]) for i in kept)
        bias = getattr(module, "bias", None)
        return torch.stack(rows) + (0 if bias is None else bias[columns])

    with torch.no_grad():
        dense = model(TOKENS).logits
        with patched(model, spec, loop):
            expected = model(TOKENS).logits
        with dropping(model, spec, prices, PRICE) as count:
            found = model(TOKENS).logits
        assert torch.equal(model(TOKENS).logits, dense)  # the hooks are removed
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (found - dense).abs().max() > 0.01
    densities = count.densities(spec)
    assert list(densities) == list(read)
    for part, density in densities.items():
        rows = by_hand(model, spec, 0, part)[1].shape[0]
        torch.testing.assert_close(density.float(), read[part] / (TOKENS.shape[1] * rows), atol=0.01, rtol=0)
        assert density.max() < 1
    assert float(densities["q"].min()) > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_the_head(family: Family, name: str) -> None:
    """The layers read all rows; the head's input is that of the dense model."""
    model, spec = family(name)
    inputs: list[torch.Tensor] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, given: inputs.append(given[0][0].clone()))
    prices = 10 ** (4 * torch.rand(1, head.weight.shape[1], generator=torch.Generator().manual_seed(3)) - 2)
    with torch.no_grad():
        dense = model(TOKENS).logits[0]
        handle.remove()
        with dropping(model, spec, {"head": prices}, PRICE) as count:
            found = model(TOKENS).logits[0]
        kept = [[i for i in range(len(x)) if not x[i] ** 2 * prices[0, i] < PRICE] for x in inputs[0]]
        rest = [x.clone() for x in inputs[0]]
        for x, rows in zip(rest, kept, strict=True):
            x[[i for i in range(len(x)) if i not in rows]] = 0
        cut = head.register_forward_pre_hook(lambda module, given: (torch.stack(rest)[None],))
        expected = model(TOKENS).logits[0]
        cut.remove()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - dense).abs().max() > 1e-4
    read = sum(bool(inputs[0][t][i]) for t, rows in enumerate(kept) for i in rows)
    assert count.read["head"].tolist() == [read]
    assert 0 < float(count.densities(spec)["head"]) < 1


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gpt-neox"])
def test_parts_without_prices_are_whole(family: Family, name: str) -> None:
    """Also if other parts of the same module skip rows."""
    model, spec = family(name)
    prices = random_prices(spec, "separate")
    with torch.no_grad(), dropping(model, spec, {"q": prices["q"], "down": prices["down"]}, PRICE) as count:
        model(TOKENS)
    for part, density in count.densities(spec).items():
        assert bool((density < 1).all()) == (part in ("q", "down")), part


@pytest.mark.parametrize("price", [0.0, -1.0, float("nan")])
def test_dense(family: Family, price: float) -> None:
    model, spec = family("llama")
    prices = random_prices(spec, "separate") | {"q": torch.zeros(spec.num_layers, spec.hidden_size)}
    with torch.no_grad():
        dense = model(TOKENS).logits
        with dropping(model, spec, prices, price) as count:
            assert torch.equal(model(TOKENS).logits, dense)
    assert all(bool((density == 1).all()) for density in count.densities(spec).values())


def test_limits_of_a_row_price(family: Family) -> None:
    """A row of price 0 is skipped at any price, one of infinity is always read."""
    model, spec = family("llama")
    size = (spec.num_layers, spec.hidden_size)
    prices = {"q": torch.zeros(size), "k": torch.full(size, torch.inf)}
    with torch.no_grad(), dropping(model, spec, prices, 1e-20) as count:
        model(TOKENS)
    found = {part: float(density.mean()) for part, density in count.densities(spec).items()}
    assert (found["q"], found["k"], found["v"]) == (0.0, 1.0, 1.0)


def test_nan_reaches_the_logits(family: Family) -> None:
    model, spec = family("llama")
    handle = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output * torch.nan)
    with torch.no_grad(), dropping(model, spec, random_prices(spec, "separate"), PRICE) as count:
        assert model(TOKENS).logits.isnan().all()
    handle.remove()
    assert float(count.densities(spec)["q"].min()) == 1.0


def test_zeros_are_never_read(family: Family) -> None:
    """Zeros of ReLU: at any price, and without one."""
    model, spec = family("opt")
    for prices, price in (({}, 0.0), (random_prices(spec, "separate"), 0.0)):
        with torch.no_grad(), dropping(model, spec, prices, price) as count:
            model(TOKENS)
        densities = count.densities(spec)
        assert 0.2 < float(densities["down"].mean()) < 0.8
        assert float(densities["up"].min()) == 1.0


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gpt-neox"])
def test_prices_by_layer_and_part(family: Family, name: str) -> None:
    """A price is as many times higher as row prices would be lower, for each token."""
    model, spec = family(name)
    prices = random_prices(spec, "separate")
    by_token = PRICE * 2.0 ** torch.arange(-3, 4)[:, None]
    factor = {part: 2.0 ** (torch.arange(spec.num_layers) + i - 2) for i, part in enumerate(prices)}
    lower = {part: price / factor[part][:, None] for part, price in prices.items()}
    with torch.no_grad():
        with dropping(model, spec, lower, by_token) as expected_count:
            expected = model(TOKENS).logits
        with dropping(model, spec, prices, lambda layer, part: by_token * factor[part][layer]) as count:
            found = model(TOKENS).logits
        with dropping(model, spec, prices, PRICE):
            plain = model(TOKENS).logits
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)
    for part, read in expected_count.read.items():
        assert torch.equal(count.read[part], read)
