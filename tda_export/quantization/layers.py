"""Run a transformers model one layer at a time: the inputs and outputs of each layer for many sequences of one length.

All sequences have the same attention masks and positions, so a layer's arguments besides the hidden state are kept
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tda_export.errors import TdaError
from tda_export.models.layerwise import LayerwiseModel, layer_module, layers_skipped
from tda_export.models.linear_modules import Linear, layer_linears
from tda_export.models.spec import DecoderSpec
from tda_export.packing import linear_sites
from tda_export.progress import Advance
from tda_export.weights.plan import HEAD

HIDDEN = "hidden_states"


class _Reached(Exception):
    """The rest of a call is not needed."""


@dataclass(frozen=True)
class Call:
    """The arguments of a layer besides the hidden state."""

    module: torch.nn.Module
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the layer on a hidden state [1, T, M]."""
        out = self.module(hidden, *self.arguments, **self.options)
        result: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return result


@torch.no_grad()
def layer_calls(model: Any, spec: DecoderSpec, sequence: torch.Tensor) -> list[Call]:
    """Record how the model calls its layers on a sequence int64 [T]. The layers are not run, and need no weights."""
    calls: list[Call] = []

    def watch(module: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        others = {name: value for name, value in options.items() if name != HIDDEN}
        calls.append(Call(module, arguments if HIDDEN in options else arguments[1:], others))

    modules = [layer_module(model, spec, layer) for layer in range(spec.num_layers)]
    handles = [module.register_forward_pre_hook(watch, with_kwargs=True) for module in modules]
    try:
        with layers_skipped(model, spec):
            model.base_model(sequence[None].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


@torch.no_grad()
def first_inputs(model: Any, spec: DecoderSpec, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Return the first layer's input for each sequence of int64 [N, T], on the CPU: [1, T, M].

    Layers need no weights.
    """
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
    """Replace each sequence's layer input by the layer's output."""
    for index, hidden in enumerate(inputs):
        inputs[index] = call(hidden.to(device)).cpu()


@torch.no_grad()
def last_log_probabilities(
    model: Any, spec: DecoderSpec, sequence: torch.Tensor, hidden: torch.Tensor, kept: int
) -> torch.Tensor:
    """Return the log-probabilities after each of the last `kept` tokens, float32 [kept, V] on the CPU.

    Args:
        model: A transformers model. Its layers are not run, and need no weights.
        spec: Its architecture.
        sequence: int64 [T].
        hidden: The output of the last layer, [1, T, M].
        kept: The number of tokens.
    """
    with layers_skipped(model, spec, hidden.to(model.device)):
        logits = model(sequence[None].to(model.device), use_cache=False, logits_to_keep=kept).logits[0]
    return logits.float().log_softmax(dim=-1).cpu()


def float_log_probabilities(
    model: LayerwiseModel, tokens: torch.Tensor, kept: int, advance: Advance
) -> list[torch.Tensor]:
    """Return the log-probabilities after each token of each continuation, float32 [kept, V] on the CPU.

    Args:
        model: The float model.
        tokens: This rank's sequences, int64 [N, P + C]; N may be 0.
        kept: The number of tokens of a continuation, C.
        advance: Called with the number of finished layers.

    Raises:
        TdaError: The log-probabilities are not finite.
    """
    calls = layer_calls(model.model, model.spec, tokens[0]) if len(tokens) else []
    hidden = first_inputs(model.model, model.spec, tokens)
    for layer in range(model.spec.num_layers):
        if calls:
            with model.layer(layer):
                pass_on(calls[layer], hidden, model.device)
        advance(1)
    found = list(continuation_log_probabilities(model, tokens, hidden, kept))
    if not all(bool(each.isfinite().all()) for each in found):
        raise TdaError(f"{model.name}: the logits are not finite. Download the weights again.")
    return found


def continuation_log_probabilities(
    model: LayerwiseModel, tokens: torch.Tensor, hidden: list[torch.Tensor], kept: int
) -> Iterator[torch.Tensor]:
    """Yield the same from the last layer's output for each sequence, [1, T, M]."""
    for sequence, left in zip(tokens, hidden, strict=True):
        yield last_log_probabilities(model.model, model.spec, sequence, left, kept)


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
    """Call `observe` with the input of a site's parts, [T, in], for each sequence. The rest of the layer is not
    computed."""
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


@torch.no_grad()
def watch_head(
    model: Any,
    spec: DecoderSpec,
    sequence: torch.Tensor,
    hidden: list[torch.Tensor],
    observe: Callable[[torch.Tensor], None],
) -> None:
    """Call `observe` with the input of the head, [T, in], for each output of the last layer, [1, T, M].

    Layers are not run, and need no weights. `sequence` int64 [T] is any of the sequences. Logits are not computed.
    """

    def take(x: torch.Tensor) -> None:
        observe(x)
        raise _Reached

    handle = Linear(model, spec, 0, HEAD).on_input(take)
    try:
        for left in hidden:
            with layers_skipped(model, spec, left.to(model.device)), _until_reached():
                model(sequence[None].to(model.device), use_cache=False)
    finally:
        handle.remove()


@contextmanager
def _until_reached() -> Iterator[None]:
    try:
        yield
    except _Reached:
        return
