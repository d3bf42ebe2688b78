"""The slow, obvious reference: transformers in PyTorch, with the FFN masked as decode masks it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tda_export.calibration.capture import capture_activations
from tda_export.calibration.cett import neuron_scores, relative_magnitudes
from tda_export.models.spec import DecoderSpec


@contextlib.contextmanager
def masked_ffn(
    model: Any, spec: DecoderSpec, masks: Sequence[torch.Tensor], tails: Sequence[torch.Tensor]
) -> Iterator[None]:
    """Drop neurons of every layer while the block runs: FFN(x) = W_down (h * mask) + tail + bias.

    Args:
        model: A transformers model.
        spec: Its architecture.
        masks: L tensors [F], 1 for kept neurons and 0 for dropped ones.
        tails: L tensors [M], added to the output.
    """
    handles = []
    for layer, (mask, tail) in enumerate(zip(masks, tails, strict=True)):
        down = model.get_submodule(spec.names.down.format(i=layer))
        mask, tail = mask.to(down.weight), tail.to(down.weight)
        handles.append(down.register_forward_pre_hook(lambda module, inputs, mask=mask: (inputs[0] * mask,)))
        handles.append(down.register_forward_hook(lambda module, inputs, output, tail=tail: output + tail))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def reference_logits(
    model: Any,
    spec: DecoderSpec,
    prompt: Sequence[int],
    continuation: Sequence[int] = (),
    masks: Sequence[torch.Tensor] | None = None,
    tails: Sequence[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a prompt densely and its continuation, given token by token, with a mask if there is one.

    Returns:
        Logits of the prompt's tokens, float32 [P, V], and of the continuation's, float32 [C, V], on the CPU.
    """
    with torch.inference_mode():
        output = model(torch.tensor([list(prompt)], device=model.device), use_cache=True)
        dense, cache, rows = output.logits[0].float().cpu(), output.past_key_values, []
        with masked_ffn(model, spec, masks, tails or []) if masks is not None else contextlib.nullcontext():
            for token in continuation:
                output = model(torch.tensor([[token]], device=model.device), past_key_values=cache, use_cache=True)
                rows.append(output.logits[0].float().cpu())
    return dense, torch.cat(rows) if rows else dense[:0]


def reference_scores(model: Any, spec: DecoderSpec, prompt: Sequence[int], *, magnitude: bool) -> list[torch.Tensor]:
    """Compute the neuron scores of a prompt, its first token left out: L tensors, float32 [F].

    `magnitude` weighs activations by the length of their down columns (TDA); without it they stand alone (Griffin).
    """
    scores: dict[int, torch.Tensor] = {}

    def score(layer: int, h: torch.Tensor, down: torch.Tensor) -> None:
        norms = down.float().norm(dim=0) if magnitude else torch.ones(spec.ffn_size, device=h.device)
        scores[layer] = neuron_scores(relative_magnitudes(h[1:], norms)).cpu()

    with torch.inference_mode(), capture_activations(model, spec, score):
        model.base_model(torch.tensor([list(prompt)], device=model.device), use_cache=False)
    return [scores[layer] for layer in range(spec.num_layers)]


def reference_tails(
    model: Any, spec: DecoderSpec, prompt: Sequence[int], masks: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Compute what the neurons outside each mask contribute to a prompt on average, its first token left out.

    Returns:
        L tensors, float32 [M]: W_down[:, D] · mean(h_D).
    """
    tails: dict[int, torch.Tensor] = {}

    def average(layer: int, h: torch.Tensor, down: torch.Tensor) -> None:
        mean = h[1:].float().mean(dim=0)  # [F]
        tails[layer] = (down.float() @ (mean * (1 - masks[layer].to(mean)))).cpu()

    with torch.inference_mode(), capture_activations(model, spec, average):
        model.base_model(torch.tensor([list(prompt)], device=model.device), use_cache=False)
    return [tails[layer] for layer in range(spec.num_layers)]
