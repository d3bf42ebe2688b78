"""The data that methods are fitted to: the FFN inputs of a calibration text, and each layer's activations on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tda_export.calibration.cett import relative_magnitudes
from tda_export.errors import TdaError
from tda_export.models.ffn_modules import ACTIVATIONS
from tda_export.models.spec import DecoderSpec


@dataclass(frozen=True)
class LayerActivations:
    """One layer on T tokens: `activated` = act(gate · x) and `relative` = r_i(t), both float32 [T, F]."""

    activated: torch.Tensor
    relative: torch.Tensor


def require_gates(spec: DecoderSpec) -> None:
    """Refuse an FFN that these methods are not defined for.

    Raises:
        TdaError: The FFN has no gates, or gate and up are packed into one module.
    """
    if not spec.gated or spec.packed_gate:
        raise TdaError(
            f"{spec.architecture}: methods in PyTorch need an FFN with separate gate and up projections. "
            "Choose a model such as smollm2-135m."
        )


def ffn_inputs(
    model: Any, spec: DecoderSpec, tokens: torch.Tensor, advance: Callable[[int], None] = lambda sequences: None
) -> list[torch.Tensor]:
    """Read sequences int64 [N, S] and return the input of every FFN, without the first token of each sequence.

    Returns:
        L tensors, float32 [N (S - 1), M], on the CPU: 4 L N S M bytes.

    Raises:
        TdaError: The FFN has no separate gates.
    """
    require_gates(spec)
    kept: list[list[torch.Tensor]] = [[] for _ in range(spec.num_layers)]

    def hook(layer: int) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def observe(gate: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            kept[layer].append(arguments[0][0, 1:].float().cpu())

        return observe

    handles = [
        model.get_submodule(spec.names.gate.format(i=layer)).register_forward_pre_hook(hook(layer))
        for layer in range(spec.num_layers)
    ]
    try:
        with torch.inference_mode():
            for sequence in tokens:
                model.base_model(sequence[None].to(model.device), use_cache=False)
                advance(1)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(pieces) for pieces in kept]


def layer_activations(model: Any, spec: DecoderSpec, layer: int, x: torch.Tensor) -> LayerActivations:
    """Compute a layer's activations on inputs x, float32 [T, M]."""
    gate, up, down = (
        model.get_submodule(name.format(i=layer)) for name in (spec.names.gate, spec.names.up, spec.names.down)
    )
    with torch.inference_mode():
        x = x.to(down.weight)
        activated = ACTIVATIONS[spec.activation](gate(x))
        relative = relative_magnitudes(activated * up(x), down.weight.float().norm(dim=0))
    return LayerActivations(activated.float().cpu(), relative.cpu())
