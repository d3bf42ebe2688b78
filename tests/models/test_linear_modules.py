"""The linears of every family: weights, outputs, inputs and gradients against those found by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tda_export.models.linear_modules import layer_linears, watch_sites
from tda_export.models.spec import DecoderSpec
from tests.linears_by_hand import by_hand, sites_of
from tests.tiny import FAMILIES

Family = Callable[[str], tuple[Any, DecoderSpec]]
TOKENS = torch.tensor([[5, 80, 33, 7, 120, 64, 9]])


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_and_outputs(family: Family, name: str) -> None:
    model, spec = family(name)
    for layer in range(spec.num_layers):
        for part, linear in layer_linears(model, spec, layer).items():
            module, weight, columns = by_hand(model, spec, layer, part)
            assert linear.module is module
            assert (linear.inputs, linear.outputs) == tuple(weight.shape)
            assert torch.equal(linear.weight, weight)
            assert not linear.weight.requires_grad
            bias = getattr(module, "bias", None)
            assert (linear.bias is None) == (bias is None)
            if bias is not None:
                assert torch.equal(linear.bias, bias[columns])
            outputs = torch.randn(2, 3, len(bias) if bias is not None else self_size(module, spec))
            assert torch.equal(linear.of_outputs(outputs), outputs[..., columns])
            own = torch.randn(2, 3, linear.outputs)
            expected = outputs.clone()
            expected[..., columns] = own
            linear.put_outputs(outputs, own)
            assert torch.equal(outputs, expected)


def self_size(module: Any, spec: DecoderSpec) -> int:
    return int(module.weight.shape[1 if spec.transposed_linears else 0])


@pytest.mark.parametrize("name", FAMILIES)
def test_inputs_and_outputs_of_a_call(family: Family, name: str) -> None:
    """The input of a site times a part's weights is the output of the part."""
    model, spec = family(name)
    inputs: dict[tuple[int, str], torch.Tensor] = {}
    outputs: dict[tuple[int, str], torch.Tensor] = {}
    handles = [
        linear.on_output(lambda y, key=(layer, part): outputs.__setitem__(key, y))
        for layer in range(spec.num_layers)
        for part, linear in layer_linears(model, spec, layer).items()
    ]
    with torch.no_grad(), watch_sites(model, spec, lambda layer, site, x: inputs.__setitem__((layer, site), x)):
        model(TOKENS)
    for handle in handles:
        handle.remove()
    names = {parts: "_".join(parts) if parts[0] != "q" else "qkv" for parts in sites_of(spec)}
    assert {site for _, site in inputs} == set(names.values())
    for layer in range(spec.num_layers):
        for parts, site in names.items():
            for part in parts:
                linear = layer_linears(model, spec, layer)[part]
                expected = inputs[layer, site] @ by_hand(model, spec, layer, part)[1]
                expected = expected if linear.bias is None else expected + linear.bias
                torch.testing.assert_close(outputs[layer, part], expected, rtol=1e-4, atol=1e-4)


def test_an_input_is_replaced(family: Family) -> None:
    model, spec = family("llama")
    linear = layer_linears(model, spec, 1)["o"]
    seen: list[torch.Tensor] = []
    handles = [linear.on_input(lambda x: 2 * x), linear.on_output(seen.append)]
    with torch.no_grad():
        model(TOKENS)
        handles[0].remove()
        model(TOKENS)
    handles[1].remove()
    torch.testing.assert_close(seen[0], 2 * seen[1])


def test_something_is_added_to_an_output(family: Family) -> None:
    model, spec = family("llama")
    addend, seen = torch.randn(spec.hidden_size), list[torch.Tensor]()
    linear = layer_linears(model, spec, 1)["down"]
    for added in (False, True):
        handles = [linear.add_to_output(addend)] if added else []
        handles.append(linear.on_output(seen.append))
        with torch.no_grad():
            model(TOKENS)
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(seen[1], seen[0] + addend)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_outputs(family: Family, name: str) -> None:
    """With the inputs, they give the gradient by the weights."""
    model, spec = family(name)
    inputs: dict[tuple[int, str], torch.Tensor] = {}
    gradients: dict[tuple[int, str], torch.Tensor] = {}
    places = [(layer, part) for layer in range(spec.num_layers) for part in layer_linears(model, spec, layer)]
    handles = []
    for layer, part in places:
        linear = layer_linears(model, spec, layer)[part]
        handles.append(linear.on_input(lambda x, key=(layer, part): inputs.update({key: x.detach()})))
        handles.append(linear.on_output_gradient(lambda g, key=(layer, part): gradients.update({key: g})))
    modules = {id(module): module for layer, part in places for module, *_ in [by_hand(model, spec, layer, part)]}
    for module in modules.values():
        module.weight.requires_grad_(True)
    try:
        model(TOKENS).logits.float().log_softmax(dim=-1)[..., 5].sum().backward()
        for layer, part in places:
            module, _, columns = by_hand(model, spec, layer, part)
            whole = module.weight.grad if spec.transposed_linears else module.weight.grad.T
            expected = inputs[layer, part].T @ gradients[layer, part]
            torch.testing.assert_close(whole[:, columns], expected, rtol=1e-3, atol=1e-5)
    finally:
        for handle in handles:
            handle.remove()
        for module in modules.values():
            module.weight.requires_grad_(False)
            module.weight.grad = None
