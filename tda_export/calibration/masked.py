"""A transformers model whose FFNs drop neurons as decode does, with access to each layer's internals."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tda_export.calibration.dense import Blended, DenseSequence
from tda_export.calibration.divergence import mean_kl
from tda_export.models.ffn_modules import ACTIVATIONS, FfnModules
from tda_export.models.spec import DecoderSpec


@dataclass(frozen=True)
class Masking:
    """What the layers drop for a sequence.

    `keep`: the prompt mask, bool [L, F]. `tail`: the output that replaces the neurons outside it, [L, M]. A token skips
    a neuron of the mask where |act(gate_i · x)| * `scale` (float32 [L, F]) is below `token_thresholds`, float32 [L], or
    zero, as with ReLU. Without gates up_i replaces gate_i.
    """

    keep: torch.Tensor
    tail: torch.Tensor
    scale: torch.Tensor
    token_thresholds: torch.Tensor


@dataclass(frozen=True)
class LayerRun:
    """One layer's run on T tokens: all activations h [T, F], the gate's estimates float32 [T, F], which neurons
    survived both levels bool [T, F], and the down projection's input [1, T, F], for which autograd may have a
    gradient."""

    h: torch.Tensor
    estimates: torch.Tensor
    survivors: torch.Tensor
    used: torch.Tensor


Observe = Callable[[int, LayerRun], None]


@contextlib.contextmanager
def two_level_ffn(
    model: Any, spec: DecoderSpec, masking: Masking, observe: Observe | None = None, layers: range | None = None
) -> Iterator[None]:
    """Apply a prompt mask and token thresholds while the block runs.

    Args:
        model: A transformers model.
        spec: Its architecture.
        masking: What to drop.
        observe: Called with each layer's run.
        layers: The layers that drop neurons; all by default.
    """
    handles = []

    def patch(layer: int) -> None:
        ffn, firsts = FfnModules(model, spec, layer), list[torch.Tensor]()

        def estimate(first: torch.Tensor) -> None:
            firsts.append(ACTIVATIONS[spec.activation](first.detach()).float().abs() * masking.scale[layer])

        def drop(h: torch.Tensor) -> torch.Tensor:
            estimates = firsts.pop()
            survivors = masking.keep[layer] & (estimates >= masking.token_thresholds[layer]) & (estimates > 0)
            used = (h * survivors)[None]
            if observe is not None:
                if torch.is_grad_enabled():
                    if not used.requires_grad:
                        used.requires_grad_()
                    used.retain_grad()
                observe(layer, LayerRun(h.detach(), estimates, survivors, used))
            return used

        handles.append(ffn.on_first(estimate))
        handles.append(ffn.on_activations(drop))
        handles.append(ffn.add_to_output(masking.tail[layer]))

    for layer in layers if layers is not None else range(spec.num_layers):
        patch(layer)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def down_weights(model: Any, spec: DecoderSpec) -> list[torch.Tensor]:
    """Return W_down of every layer, [M, F]."""
    return [FfnModules(model, spec, layer).down_weight for layer in range(spec.num_layers)]


def choose_masking(
    down: list[torch.Tensor],
    blended: Blended,
    thresholds_square: torch.Tensor,
    token_thresholds: torch.Tensor,
    scale: torch.Tensor,
) -> Masking:
    """Choose a prompt's mask and tail mean as prefill does.

    Args:
        down: W_down of every layer, [M, F].
        blended: The prompt's blended statistics.
        thresholds_square: Squares of the score thresholds, float32 [L].
        token_thresholds: float32 [L].
        scale: Neuron scales, float32 [L, F].
    """
    keep = blended.score_square >= thresholds_square[:, None]
    means = blended.mean_activation * ~keep
    tail = torch.stack([w.float() @ mean for w, mean in zip(down, means, strict=True)])
    return Masking(keep, tail, scale, token_thresholds)


def masked_kl(model: Any, sequence: DenseSequence) -> torch.Tensor:
    """Run a continuation in the model as currently patched; return the mean KL(dense || masked), nats per token, a
    scalar."""
    logits = model(sequence.continuation, past_key_values=sequence.cache(), use_cache=True).logits[0]
    log_q = logits.float().log_softmax(dim=-1)
    # float16 rounded the probabilities. Unless they are normalised again, small divergences are noise, even negative.
    log_p = sequence.log_probs.float().log_softmax(dim=-1)
    return mean_kl(log_p, log_q)
