"""Calibration sequences under the dense model: the statistics that choose prompt masks, and the reference for their
cost."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from tda_export.calibration.capture import capture_activations
from tda_export.calibration.cett import relative_magnitudes
from tda_export.models.spec import DecoderSpec
from tda_export.progress import Advance


@dataclass(frozen=True)
class NeuronSums:
    """Sums of r_i(t)^2 and of h_i(t) over `tokens` tokens, float32 [L, F] each, as in prefill's statistics."""

    score_square: torch.Tensor
    activation: torch.Tensor
    tokens: int

    def double(self) -> NeuronSums:
        """Return the same sums in float64."""
        return NeuronSums(self.score_square.double(), self.activation.double(), self.tokens)

    def plus(self, other: NeuronSums, weight: float = 1.0) -> NeuronSums:
        """Add other sums times a weight; the resulting number of tokens is not rounded."""
        return NeuronSums(
            self.score_square + weight * other.score_square,
            self.activation + weight * other.activation,
            self.tokens + weight * other.tokens,  # type: ignore[arg-type]
        )


@dataclass(frozen=True)
class DenseSequence:
    """A prompt, read densely, and its continuation.

    `continuation`: int64 [1, C]. `log_probs`: the dense model's log-probabilities after each token of the continuation,
    float16 [C, V]. `prompt` and `rest`: sums over the tokens of prompt and continuation, without the first token of the
    sequence.
    """

    continuation: torch.Tensor
    log_probs: torch.Tensor
    prompt: NeuronSums
    rest: NeuronSums
    _cache: Any

    def cache(self) -> Any:
        """Return a fresh copy of the prompt's keys and values, for one forward pass."""
        return copy.deepcopy(self._cache)


def read_dense(
    model: Any, spec: DecoderSpec, tokens: torch.Tensor, prompt_tokens: int, advance: Advance = lambda units: None
) -> list[DenseSequence]:
    """Run sequences densely.

    Args:
        model: A transformers model in evaluation mode.
        spec: Its architecture.
        tokens: int64 [N, P + C].
        prompt_tokens: P.
        advance: Called with 1 after each sequence.
    """
    return [_read(model, spec, sequence.to(model.device), prompt_tokens, advance) for sequence in tokens]


def _read(model: Any, spec: DecoderSpec, tokens: torch.Tensor, prompt_tokens: int, advance: Advance) -> DenseSequence:
    shape = (2, spec.num_layers, spec.ffn_size)
    sums = {part: torch.zeros(shape, device=tokens.device) for part in ("prompt", "rest")}
    part = "prompt"

    def add(layer: int, h: torch.Tensor, down: torch.Tensor) -> None:
        h = h.float()[1:] if part == "prompt" else h.float()
        sums[part][0, layer] = relative_magnitudes(h, down.float().norm(dim=0)).square().sum(dim=0)
        sums[part][1, layer] = h.sum(dim=0)

    # Not inference_mode: gradients will flow through attention to these keys and values.
    with torch.no_grad(), capture_activations(model, spec, add):
        cache = model(tokens[None, :prompt_tokens], use_cache=True, logits_to_keep=1).past_key_values
        kept = copy.deepcopy(cache)
        part = "rest"
        logits = model(tokens[None, prompt_tokens:], past_key_values=cache, use_cache=True).logits[0]
    advance(1)
    return DenseSequence(
        continuation=tokens[None, prompt_tokens:],
        log_probs=logits.float().log_softmax(dim=-1).half(),
        prompt=NeuronSums(sums["prompt"][0], sums["prompt"][1], prompt_tokens - 1),
        rest=NeuronSums(sums["rest"][0], sums["rest"][1], len(tokens) - prompt_tokens),
        _cache=kept,
    )


@dataclass(frozen=True)
class Blended:
    """Squared scores and mean activations of one prompt and the prior, float32 [L, F]."""

    score_square: torch.Tensor
    mean_activation: torch.Tensor


def blend(sequences: list[DenseSequence], prior_tokens: float) -> list[Blended]:
    """Blend each prompt's statistics with a prior from the other sequences, as prefill does with the artifact's prior.

    s_i^2 = (sum over the prompt's tokens of r_i(t)^2 + n0 p_i^2) / (P - 1 + n0), where p_i is the prior's score.

    Args:
        sequences: N sequences. With only one, or without prior tokens, the prior is left out.
        prior_tokens: n0, the number of tokens that the prior counts for (its pseudo-count).
    """
    # In float64: the other sequences' sums are a difference, which float32 could round away if one prompt dominates.
    whole = [sequence.prompt.double().plus(sequence.rest) for sequence in sequences]
    total = whole[0]
    for sums in whole[1:]:
        total = total.plus(sums)
    blended = []
    for sequence, own in zip(sequences, whole, strict=True):
        sums = sequence.prompt.double()
        if prior_tokens and len(sequences) > 1:
            others = total.plus(own, -1.0)
            sums = sums.plus(others, prior_tokens / others.tokens)
        score_square, mean_activation = sums.score_square / sums.tokens, sums.activation / sums.tokens
        blended.append(Blended(score_square.float(), mean_activation.float()))
    return blended
