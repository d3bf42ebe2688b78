"""Read FFN activations out of a transformers model while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tda_export.models.spec import DecoderSpec

# (layer, h [T, F] in the model's dtype, W_down as transformers holds it [M, F])
OnActivations = Callable[[int, torch.Tensor, torch.Tensor], None]
# (layer, up · x [T, F] in the model's dtype)
OnUp = Callable[[int, torch.Tensor], None]


@contextlib.contextmanager
def capture_activations(
    model: Any, spec: DecoderSpec, on_activations: OnActivations, on_up: OnUp | None = None
) -> Iterator[None]:
    """Call `on_activations`, and before it `on_up`, for every layer of each forward pass of batch 1 in the block.

    The input of the down projection is h, whatever comes before it in the family's FFN.
    """

    def hook(layer: int) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def observe(down: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            on_activations(layer, arguments[0][0], down.weight)  # type: ignore[arg-type]

        return observe

    def up_hook(layer: int, on_up: OnUp) -> Callable[[torch.nn.Module, Any, torch.Tensor], None]:
        def observe(up: torch.nn.Module, arguments: Any, output: torch.Tensor) -> None:
            on_up(layer, output[0])

        return observe

    handles = [
        model.get_submodule(spec.names.down.format(i=layer)).register_forward_pre_hook(hook(layer))
        for layer in range(spec.num_layers)
    ]
    if on_up is not None:
        handles += [
            model.get_submodule(spec.names.up.format(i=layer)).register_forward_hook(up_hook(layer, on_up))
            for layer in range(spec.num_layers)
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
