"""Where a transformers model computes its FFN, whatever the family packs together or leaves out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from tda_export.models.spec import Activation, DecoderSpec

ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
    "relu": torch.nn.functional.relu,
}
Observe = Callable[[torch.Tensor], None]


class FfnModules:
    """One layer's FFN in a transformers model. Calls of the model are of batch 1; T tokens, F neurons, M hidden size.

    A neuron's first product is the one that the activation function is applied to: gate · x, without gates up · x.
    """

    def __init__(self, model: Any, spec: DecoderSpec, layer: int) -> None:
        self._spec = spec
        names = spec.names
        self.first = model.get_submodule((names.gate if spec.gated else names.up).format(i=layer))
        self.up = model.get_submodule(names.up.format(i=layer))
        self.down = model.get_submodule(names.down.format(i=layer))

    @property
    def down_weight(self) -> torch.Tensor:
        """W_down, [M, F], without gradient."""
        weight: torch.Tensor = self.down.weight.detach()
        return weight.T if self._spec.transposed_linears else weight

    def on_first(self, observe: Observe) -> Any:
        """Give `observe` the first products [T, F] of each call; return the hook's handle."""
        packed = self._spec.packed_gate
        return self._on_output(self.first, observe, slice(0, self._spec.ffn_size) if packed else slice(None))

    def on_up(self, observe: Observe) -> Any:
        """Give `observe` what activations are multiplied by, [T, F]: up · x, and 1 without gates."""
        if not self._spec.gated:
            return self._on_output(self.first, lambda first: observe(torch.ones_like(first)), slice(None))
        packed = self._spec.packed_gate
        return self._on_output(self.up, observe, slice(self._spec.ffn_size, None) if packed else slice(None))

    def on_activations(self, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
        """Give `change` the activations h [T, F] that go into W_down, and take what it returns in their place.

        None leaves them as they are.
        """

        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
            h = change(_rows(inputs[0]))
            return None if h is None else (h.view_as(inputs[0]),)

        return self.down.register_forward_pre_hook(hook)

    def add_to_output(self, tail: torch.Tensor) -> Any:
        """Add a vector [M] to the FFN's output; return the hook's handle."""
        return self.down.register_forward_hook(lambda module, inputs, output: output + tail.to(output))

    @staticmethod
    def _on_output(module: torch.nn.Module, observe: Observe, columns: slice) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
            observe(_rows(output)[:, columns])

        return module.register_forward_hook(hook)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Drop the batch axis, which some families have flattened away already: [1, T, N] or [T, N] to [T, N]."""
    return x.flatten(0, -2)
