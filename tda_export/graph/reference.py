"""The slow, obvious reference: transformers in PyTorch, with the FFN masked as decode masks it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tda_export.calibration.capture import capture_activations
from tda_export.calibration.cett import neuron_scores, relative_magnitudes
from tda_export.models.ffn_modules import ACTIVATIONS, FfnModules
from tda_export.models.spec import DecoderSpec


@dataclass(frozen=True)
class SecondLevel:
    """Two-level decoding: a neuron is skipped for a token where |act(gate_i · x)| * scales_i < threshold.

    `scales` are L tensors [F], `thresholds` L numbers. Where `thresholds` is empty, a layer's threshold is chosen when
    it first runs, and appended: a value near the median that no estimate is close to, so that rounding decides nothing.
    """

    scales: Sequence[torch.Tensor]
    thresholds: list[float]

    def keep(self, layer: int, activated: torch.Tensor) -> torch.Tensor:
        """Return which neurons each token keeps, given act(gate · x) [.., F]."""
        estimates = activated.float().abs() * self.scales[layer].to(activated.device)
        if layer == len(self.thresholds):
            self.thresholds.append(threshold_in_a_gap(estimates))
        return estimates >= self.thresholds[layer]


def threshold_in_a_gap(estimates: torch.Tensor) -> float:
    """Return the middle of the widest gap between neighbours around the median of estimates of any shape."""
    ordered = estimates.flatten().sort().values
    middle = ordered[int(0.4 * len(ordered)) : int(0.6 * len(ordered)) + 2]
    widest = int(middle.diff().argmax())
    return float(middle[widest : widest + 2].mean())


@contextlib.contextmanager
def masked_ffn(
    model: Any,
    spec: DecoderSpec,
    masks: Sequence[torch.Tensor],
    tails: Sequence[torch.Tensor],
    second_level: SecondLevel | None = None,
) -> Iterator[None]:
    """Drop neurons of every layer while the block runs: FFN(x) = W_down (h * mask) + tail + bias.

    Args:
        model: A transformers model.
        spec: Its architecture.
        masks: The prompt masks, L tensors [F], 1 for kept neurons and 0 for dropped ones.
        tails: L tensors [M], added to the output.
        second_level: Drops further neurons, token by token.
    """
    handles: list[Any] = []

    def drop(layer: int, mask: torch.Tensor) -> None:
        ffn, firsts = FfnModules(model, spec, layer), list[torch.Tensor]()

        def masked(h: torch.Tensor) -> torch.Tensor:
            kept = h * mask.to(h)
            if second_level is None:
                return kept
            return kept * second_level.keep(layer, ACTIVATIONS[spec.activation](firsts.pop()))

        handles.append(ffn.on_activations(masked))
        if second_level is not None:
            handles.append(ffn.on_first(firsts.append))
        handles.append(ffn.add_to_output(tails[layer]))

    for layer, mask in enumerate(masks):
        drop(layer, mask)
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
    second_level: SecondLevel | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a prompt densely, and its continuation with a prompt mask if one is given.

    The continuation is read token by token or, with a second level, in one call, whose estimates choose thresholds.

    Returns:
        Logits of the prompt's tokens, float32 [P, V], and of the continuation's, float32 [C, V], on the CPU.
    """
    with torch.inference_mode():
        output = model(torch.tensor([list(prompt)], device=model.device), use_cache=True)
        dense, cache, rows = output.logits[0].float().cpu(), output.past_key_values, []
        masking = masked_ffn(model, spec, masks, tails or [], second_level) if masks is not None else None
        pieces = [[token] for token in continuation] if second_level is None else [list(continuation)]
        with masking or contextlib.nullcontext():
            for piece in pieces:
                output = model(torch.tensor([piece], device=model.device), past_key_values=cache, use_cache=True)
                rows.append(output.logits[0].float().cpu())
    return dense, torch.cat(rows) if rows else dense[:0]


def reference_scores(model: Any, spec: DecoderSpec, prompt: Sequence[int], *, magnitude: bool) -> list[torch.Tensor]:
    """Compute the neuron scores of a prompt, its first token left out: L tensors, float32 [F].

    `magnitude` weights activations by the length of their down columns (TDA); without it they are unweighted (Griffin).
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
