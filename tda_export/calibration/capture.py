"""Read FFN activations out of a transformers model while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tda_export.models.ffn_modules import FfnModules
from tda_export.models.spec import DecoderSpec

# (layer, h [T, F] in the model's dtype, W_down [M, F])
OnActivations = Callable[[int, torch.Tensor, torch.Tensor], None]
# (layer, up · x [T, F] in the model's dtype)
OnUp = Callable[[int, torch.Tensor], None]


@contextlib.contextmanager
def capture_activations(
    model: Any, spec: DecoderSpec, on_activations: OnActivations, on_up: OnUp | None = None
) -> Iterator[None]:
    """Call `on_up` and then `on_activations` for every layer of each forward pass (batch 1) in the block.

    h is the input of the down projection in every family's FFN. Without gates `on_up` gets ones.
    """

    handles: list[Any] = []

    def watch(layer: int) -> None:
        ffn = FfnModules(model, spec, layer)
        handles.append(ffn.on_activations(lambda h: on_activations(layer, h, ffn.down_weight)))
        if on_up is not None:
            handles.append(ffn.on_up(lambda up: on_up(layer, up)))

    for layer in range(spec.num_layers):
        watch(layer)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
