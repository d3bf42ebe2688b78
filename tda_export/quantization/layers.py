"""Layers of a transformers model one at a time: what enters each, and what leaves it, for many sequences of one length.

All sequences have the same masks and positions, so that what a layer is called with beside the hidden state is kept
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tda_export.models.linear_modules import layer_linears
from tda_export.models.spec import DecoderSpec
from tda_export.packing import linear_sites

HIDDEN = "hidden_states"


class _Reached(Exception):
    """The rest of a call is not needed."""


@dataclass(frozen=True)
class Call:
    """What a layer is called with beside the hidden state."""

    module: torch.nn.Module
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the layer on a hidden state [1, T, M]."""
        out = self.module(hidden, *self.arguments, **self.options)
        result: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return result


def layer_module(model: Any, spec: DecoderSpec, layer: int) -> torch.nn.Module:
    """Return a layer of a transformers model."""
    before, _, _ = spec.names.attention_out.partition("{i}")
    module: torch.nn.Module = model.get_submodule(f"{before}{layer}")
    return module


@torch.no_grad()
def layer_calls(model: Any, spec: DecoderSpec, sequence: torch.Tensor) -> list[Call]:
    """Watch how the model calls its layers on a sequence int64 [T]."""
    calls: list[Call] = []

    def watch(module: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        others = {name: value for name, value in options.items() if name != HIDDEN}
        calls.append(Call(module, arguments if HIDDEN in options else arguments[1:], others))

    modules = [layer_module(model, spec, layer) for layer in range(spec.num_layers)]
    handles = [module.register_forward_pre_hook(watch, with_kwargs=True) for module in modules]
    try:
        model.base_model(sequence[None].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


@torch.no_grad()
def first_inputs(model: Any, spec: DecoderSpec, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Return what enters the first layer for each sequence of int64 [N, T], on the CPU: [1, T, M]."""
    found: list[torch.Tensor] = []

    def take(module: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        found.append((options[HIDDEN] if HIDDEN in options else arguments[0]).cpu())
        raise _Reached

    handle = layer_module(model, spec, 0).register_forward_pre_hook(take, with_kwargs=True)
    try:
        for sequence in tokens:
            with _until_reached():
                model.base_model(sequence[None].to(model.device), use_cache=False)
    finally:
        handle.remove()
    return found


@torch.no_grad()
def pass_on(call: Call, inputs: list[torch.Tensor], device: torch.device) -> None:
    """Replace what enters a layer, for each sequence, by what leaves it."""
    for index, hidden in enumerate(inputs):
        inputs[index] = call(hidden.to(device)).cpu()


@torch.no_grad()
def watch_site(
    model: Any,
    spec: DecoderSpec,
    layer: int,
    site: str,
    call: Call,
    inputs: list[torch.Tensor],
    observe: Callable[[torch.Tensor], None],
) -> None:
    """Give `observe` what the parts of a site read, [T, in], for each sequence; of the layer no more is computed."""
    linear = layer_linears(model, spec, layer)[linear_sites(spec)[site][0]]

    def take(x: torch.Tensor) -> None:
        observe(x)
        raise _Reached

    handle = linear.on_input(take)
    try:
        for hidden in inputs:
            with _until_reached():
                call(hidden.to(model.device))
    finally:
        handle.remove()


@contextmanager
def _until_reached() -> Iterator[None]:
    try:
        yield
    except _Reached:
        return
