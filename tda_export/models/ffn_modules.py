"""The place where a transformers model computes its FFN, in every family's packing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from tda_export.models.linear_modules import Change, Linear, Observe
from tda_export.models.spec import Activation, DecoderSpec

ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
    "relu": torch.nn.functional.relu,
}


class FfnModules:
    """One layer's FFN in a transformers model. Calls of the model are of batch 1; T tokens, F neurons, M hidden size.

    A neuron's first product is the one to which the activation function is applied: gate · x, or up · x without gates.
    """

    def __init__(self, model: Any, spec: DecoderSpec, layer: int) -> None:
        self._gated = spec.gated
        self._first = Linear(model, spec, layer, "gate" if spec.gated else "up")
        self._up = Linear(model, spec, layer, "up")
        self._down = Linear(model, spec, layer, "down")

    @property
    def down_weight(self) -> torch.Tensor:
        """W_down, [M, F], without gradient."""
        return self._down.weight.T

    def on_first(self, observe: Observe) -> Any:
        """Call `observe` with the first products [T, F] of each call; return the hook's handle."""
        return self._first.on_output(observe)

    def on_up(self, observe: Observe) -> Any:
        """Call `observe` with the factors of the activations, [T, F]: up · x, or 1 without gates."""
        if not self._gated:
            return self._up.on_output(lambda first: observe(torch.ones_like(first)))
        return self._up.on_output(observe)

    def on_activations(self, change: Change) -> Any:
        """Call `change` with the activations h [T, F], the input of W_down, and replace them by its result.

        None leaves them unchanged.
        """
        return self._down.on_input(change)

    def add_to_output(self, tail: torch.Tensor) -> Any:
        """Add a vector [M] to the FFN's output; return the hook's handle."""
        return self._down.add_to_output(tail)
