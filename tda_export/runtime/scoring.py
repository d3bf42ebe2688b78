"""Score a given continuation instead of choosing one: measures on the same tokens what skipping rows costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tda_export.errors import TdaError
from tda_export.graph import contract
from tda_export.runtime.deployment import AnyDeployment, PriceDeployment
from tda_export.runtime.generate import MaskMode
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.model import Model
from tda_export.runtime.phases import decode, prefill
from tda_export.runtime.priced import PricedPrefill
from tda_export.runtime.session import device_tensor


@dataclass(frozen=True)
class Fidelity:
    """How close two distributions over next tokens are: mean KL divergence in nats, and share of equal top-1 tokens."""

    kl: float
    agreement: float


def continuation_logits(
    model: Model,
    prompt: Sequence[int],
    continuation: Sequence[int],
    *,
    mask: MaskMode | None = None,
    deployment: AnyDeployment | None = None,
) -> np.ndarray:
    """Compute the logits after each token of a continuation, with a dense context and the prompt's mask.

    Args:
        model: A loaded artifact.
        prompt: P token ids, read densely by prefill.
        continuation: C token ids, read by decode as `mask` says, all in one call, without refreshes.
        mask: As for `Model.generate`.
        deployment: Replaces the artifact's own deployment.

    Returns:
        float32 [C, V].

    Raises:
        TdaError: Prompt and continuation together are longer than the model's maximum.
    """
    shape, sessions = model.artifact.shape, model.sessions
    if len(prompt) + len(continuation) > shape.max_positions:
        raise TdaError(
            f"{len(prompt)} and {len(continuation)} tokens are more than the model's {shape.max_positions} positions. "
            "Shorten one of them."
        )
    how = deployment or model.artifact.deployment
    if isinstance(how, PriceDeployment):
        return _priced_logits(model, prompt, continuation, 0.0 if mask == "dense" else how.price)
    cache = KvCache(shape, model.provider, len(prompt) + len(continuation))
    _, chosen = prefill(sessions, shape, prompt, cache, how.thresholds, prior=how.prior)
    if mask == "dense":
        return decode(sessions, cache, continuation, None)
    given = chosen if how.tail_mean else chosen.without_tail()
    inputs = {}
    if sessions.two_levels:
        inputs[contract.TOKEN_THRESHOLDS] = device_tensor(how.token_thresholds, sessions.provider)
    return decode(sessions, cache, continuation, given, inputs)


def _priced_logits(model: Model, prompt: Sequence[int], continuation: Sequence[int], price: float) -> np.ndarray:
    shape, sessions = model.artifact.shape, model.sessions
    cache = KvCache(shape, model.provider, len(prompt) + len(continuation))
    PricedPrefill(sessions, shape, cache).read(prompt)
    given = {contract.PRICE: device_tensor(np.array([price], np.float32), sessions.provider)}
    return decode(sessions, cache, continuation, None, given)


def compare(dense: np.ndarray, sparse: np.ndarray) -> Fidelity:
    """Compare logits float32 [C, V] with the dense model's: KL(dense || sparse), mean over the C tokens."""
    agreement = (dense.argmax(axis=1) == sparse.argmax(axis=1)).mean()
    return Fidelity(float(token_kl(dense, sparse).mean()), float(agreement))


def token_kl(dense: np.ndarray, sparse: np.ndarray) -> np.ndarray:
    """Return KL(dense || sparse) of each of C tokens from logits float32 [C, V], in nats, float64 [C]."""
    return log_kl(log_softmax(dense), log_softmax(sparse))


def log_kl(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """Return KL(p || q) of each of C tokens from log-probabilities float64 [C, V], in nats, float64 [C]."""
    kl: np.ndarray = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    return kl


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities of logits [C, V], float64 [C, V]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
