"""Where a transformers model computes its FFN, whatever the family packs together or leaves out."""

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

    A neuron's first product is the one that the activation function is applied to: gate · x, without gates up · x.
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
        """Give `observe` the first products [T, F] of each call; return the hook's handle."""
        return self._first.on_output(observe)

    def on_up(self, observe: Observe) -> Any:
        """Give `observe` what activations are multiplied by, [T, F]: up · x, and 1 without gates."""
        if not self._gated:
            return self._up.on_output(lambda first: observe(torch.ones_like(first)))
        return self._up.on_output(observe)

    def on_activations(self, change: Change) -> Any:
        """Give `change` the activations h [T, F] that go into W_down, and take what it returns in their place.

        None leaves them as they are.
        """
        return self._down.on_input(change)

    def add_to_output(self, tail: torch.Tensor) -> Any:
        """Add a vector [M] to the FFN's output; return the hook's handle."""
        return self._down.add_to_output(tail)
