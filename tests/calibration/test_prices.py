"""Prices of rows against gradients of cloned inputs, in every family."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tda_export.calibration.prices import (
    PriceSums,
    no_prices,
    price_continuation,
    priced_matrices,
    read_prompt,
    sampled_labels,
)
from tda_export.errors import TdaError
from tda_export.models.spec import DecoderSpec
from tda_export.packing import RowBytes, row_bytes_of
from tda_export.weights.plan import HEAD
from tests.linears_by_hand import by_hand, patched, sites_of
from tests.tiny import FAMILIES

Family = Callable[[str], tuple[Any, DecoderSpec]]
PROMPT, CONTINUATION, LABELS = 10, 6, 2


def draw_tokens(vocabulary: int, index: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randint(3, vocabulary, (PROMPT + CONTINUATION,), generator=generator)


def draw_labels(vocabulary: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randint(3, vocabulary, (LABELS, CONTINUATION - 1), generator=generator)


def price(model: Any, spec: DecoderSpec, tokens: torch.Tensor, choose: Any) -> PriceSums:
    cache = read_prompt(model, tokens[:PROMPT])
    return price_continuation(model, spec, cache, tokens[PROMPT:], choose, head=True)


class _Removed:
    """Removes a hook when it is closed."""

    def __init__(self, handle: Any) -> None:
        self.close = handle.remove


def squares_of_clones(
    model: Any, spec: DecoderSpec, tokens: torch.Tensor, labels: torch.Tensor
) -> dict[tuple[str, ...], torch.Tensor]:
    """Return sums over tokens of the squared gradient by a clone of the input that only these parts read, [L, in], and
    of the head's input, [1, in].

    The whole sequence is one call without cache. The label of the prompt's last token changes nothing.
    """
    groups = {(part,) for site in sites_of(spec) for part in site} | set(sites_of(spec))
    squares: dict[tuple[str, ...], torch.Tensor] = {}
    for row in labels:
        clones: dict[tuple[tuple[str, ...], int], torch.Tensor] = {}

        def own(layer: int, part: str, x: torch.Tensor, outputs: torch.Tensor, clones: Any = clones) -> torch.Tensor:
            weight = by_hand(model, spec, layer, part)[1]
            for group in groups:
                if part in group:
                    clone = clones.setdefault((group, layer), x.detach().clone().requires_grad_())
                    outputs = outputs + (clone - clone.detach()) @ weight
            return outputs

        def of_head(module: Any, inputs: Any, outputs: torch.Tensor, clones: Any = clones) -> torch.Tensor:
            clone = clones.setdefault(((HEAD,), 0), inputs[0][0].detach().clone().requires_grad_())
            return outputs + (clone - clone.detach()) @ module.weight.T

        handle = model.get_output_embeddings().register_forward_hook(of_head)
        with torch.enable_grad(), patched(model, spec, own), contextlib.closing(_Removed(handle)):
            log_probs = model(tokens[None]).logits[0].log_softmax(dim=-1)
            total = sum(log_probs[PROMPT + t, label] for t, label in enumerate(row))
            keys = list(clones)
            for (group, layer), gradient in zip(keys, torch.autograd.grad(total, list(clones.values())), strict=True):
                layers = 1 if group == (HEAD,) else spec.num_layers
                found = squares.setdefault(group, torch.zeros(layers, gradient.shape[1]))
                for token in range(PROMPT, PROMPT + CONTINUATION):
                    found[layer] += gradient[token] ** 2
    return squares


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_cloned_inputs(family: Family, name: str) -> None:
    model, spec = family(name)
    tokens, labels = draw_tokens(spec.vocab_size), draw_labels(spec.vocab_size)
    found = price(model, spec, tokens, lambda logits: labels)
    expected = squares_of_clones(model, spec, tokens, labels)
    assert float(found.tokens) == LABELS * CONTINUATION
    matrices = priced_matrices(spec) | {HEAD: (HEAD,)}
    assert {parts: name for name, parts in matrices.items()}.keys() == expected.keys()
    assert found.square.keys() == matrices.keys()
    for matrix, parts in matrices.items():
        square = found.square[matrix]
        assert square.dtype == torch.float64
        scale = float(expected[parts].abs().max())
        torch.testing.assert_close(square.float(), expected[parts], rtol=2e-3, atol=1e-5 * scale)
        assert (square > 0).float().mean() > 0.9
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_model_is_as_before(family: Family) -> None:
    model, spec = family("llama")
    tokens = draw_tokens(spec.vocab_size)
    with torch.no_grad():
        before = model(tokens[None]).logits
        price(model, spec, tokens, sampled_labels(2, 0, 0))
        assert torch.equal(model(tokens[None]).logits, before)
        assert not model.get_input_embeddings()(tokens).requires_grad


def test_a_site_adds_before_it_squares(family: Family) -> None:
    model, spec = family("llama")
    square = price(model, spec, draw_tokens(spec.vocab_size), sampled_labels(2, 0, 0)).square
    assert not torch.allclose(square["gate_up"], square["gate"] + square["up"], rtol=0.05)


def test_order_does_not_matter(family: Family) -> None:
    """The labels depend on the sequence, not on the order."""
    model, spec = family("llama")
    sequences = [draw_tokens(spec.vocab_size, index) for index in range(3)]

    def add_up(order: list[int]) -> PriceSums:
        total = no_prices(spec, head=True)
        for index in order:
            total = total + price(model, spec, sequences[index], sampled_labels(2, 7, index))
        return total

    first, other = add_up([0, 1, 2]), add_up([2, 0, 1])
    for name, square in first.square.items():
        torch.testing.assert_close(square, other.square[name], rtol=1e-12, atol=0)
    assert torch.equal(first.tokens, other.tokens)


def test_labels_are_the_models_own() -> None:
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1, 1e-9]])).expand(200, 4)
    labels = sampled_labels(20, 0, 0)(logits)
    assert labels.shape == (20, 200)
    shares = torch.bincount(labels.flatten(), minlength=4) / labels.numel()
    torch.testing.assert_close(shares, torch.tensor([0.7, 0.2, 0.1, 0.0]), atol=0.03, rtol=0)
    assert torch.equal(labels, sampled_labels(20, 0, 0)(logits))
    assert not torch.equal(labels, sampled_labels(20, 0, 1)(logits))
    assert not torch.equal(labels, sampled_labels(20, 1, 0)(logits))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(family: Family, dtype: torch.dtype) -> None:
    """Gradients so small that unscaled they round to zero in float16 still count."""
    model, spec = family("llama")
    tokens, labels = draw_tokens(spec.vocab_size), draw_labels(spec.vocab_size)
    exact = price(model, spec, tokens, lambda logits: labels)
    half = price(copy.deepcopy(model).to(dtype), spec, tokens, lambda logits: labels)
    for name, square in exact.square.items():
        relative = float((half.square[name] - square).norm() / square.norm())
        assert relative < (0.1 if dtype == torch.float16 else 0.5), name


@pytest.mark.parametrize("factor", [1e-6, 1e3])
def test_the_scale_of_half_precision_fits(family: Family, factor: float) -> None:
    """The scale changes if gradients underflow, with a small head, or if scaled ones overflow, with a large head."""
    model, spec = family("llama")
    model = copy.deepcopy(model)
    model.lm_head.weight.mul_(factor)
    tokens, labels = draw_tokens(spec.vocab_size), draw_labels(spec.vocab_size)
    exact = price(model, spec, tokens, lambda logits: labels)
    half = price(model.half(), spec, tokens, lambda logits: labels)
    for name, square in exact.square.items():
        assert float((half.square[name] - square).norm() / square.norm()) < 0.3, name


def test_gradients_that_are_not_finite(family: Family) -> None:
    model, spec = family("llama")
    model = copy.deepcopy(model)
    model.lm_head.weight[:] = torch.nan
    labels = draw_labels(spec.vocab_size)
    with pytest.raises(TdaError, match=r"^Gradients are not finite\. Calibrate with --dtype bf16 or fp32\.$"):
        price(model, spec, draw_tokens(spec.vocab_size), lambda logits: labels)


def test_row_prices(family: Family) -> None:
    """A row price is c² divided by the bytes of a row in this packing."""
    model, spec = family("llama")
    sums = price(model, spec, draw_tokens(spec.vocab_size), sampled_labels(1, 0, 0))
    row_bytes = row_bytes_of(spec, 4, None, head=True)
    separate, sites = (sums.row_prices(spec, packing, row_bytes) for packing in ("separate", "sites"))
    assert list(separate) == ["q", "k", "v", "o", "gate", "up", "down", "head"]
    assert list(sites) == ["qkv", "o", "gate_up", "down", "head"]
    torch.testing.assert_close(sites["head"], (sums.square["head"] / CONTINUATION / (spec.vocab_size * 4)).float())
    mean = {name: square / CONTINUATION for name, square in sums.square.items()}
    torch.testing.assert_close(separate["k"], (mean["k"] / (32 * 4)).float())
    torch.testing.assert_close(sites["qkv"], (mean["qkv"] / ((64 + 32 + 32) * 4)).float())
    torch.testing.assert_close(sites["gate_up"], (mean["gate_up"] / (2 * 96 * 4)).float())
    torch.testing.assert_close(sums.row_prices(spec, "separate", RowBytes(2))["down"], 2 * separate["down"])
    assert "head" not in sums.row_prices(spec, "sites", RowBytes(4))
