"""Quality on a text by the strict protocol: a dense prompt, its prompt mask, and sparse steps for every token of the
continuation.

A text is cut into windows of P + C + 1 tokens. Prefill reads P of them densely and chooses the prompt mask. Decode
reads the next C under it, so that each of the C predictions (of tokens P + 1 to P + C) comes from a sparse step. The
same tokens are then read with every neuron, over the same dense context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tda_export.errors import TdaError, UsageError
from tda_export.evaluation.methods import AnySetting
from tda_export.evaluation.setting import Counted
from tda_export.ranks import ALONE, Ranks
from tda_export.runtime.artifact import Artifact
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import decode
from tda_export.runtime.scoring import log_kl, log_softmax


@dataclass(frozen=True)
class TextSettings:
    """The number of windows, and their lengths in tokens (prompt P, continuation C)."""

    prompts: int = 32
    prompt_tokens: int = 384
    continuation_tokens: int = 128

    def __post_init__(self) -> None:
        if self.prompts < 2 or self.prompt_tokens < 2 or self.continuation_tokens < 1:
            raise UsageError("Give 2 prompts or more, of 2 tokens or more, and 1 token of continuation or more.")

    @property
    def window(self) -> int:
        """The tokens of a window: one more than are read, since the last is only predicted."""
        return self.prompt_tokens + self.continuation_tokens + 1


@dataclass(frozen=True)
class TextQuality:
    """Means over windows, with standard errors over windows (windows are independent draws, their tokens are not).

    KL is KL(dense || sparse) in nats per token. Perplexities are exp of the mean negative log-likelihood per token.
    Agreement is the share of equal top-1 tokens. Density is the share of kept neurons (by the prompt mask or by a
    token). `ffn_bytes` is the mean FFN bytes that a token reads, `refresh_ffn_bytes` the part of them due to refreshes,
    and `linear_bytes` the mean bytes of the linears of all layers, FFN and attention. `head_share` is the mean share of
    the head's bytes that a token reads.
    """

    prompts: int
    kl: float
    kl_stderr: float
    perplexity: float
    perplexity_stderr: float
    dense_perplexity: float
    dense_perplexity_stderr: float
    agreement: float
    agreement_stderr: float
    density: float
    ffn_bytes: float
    refresh_ffn_bytes: float
    dense_ffn_bytes: int
    linear_bytes: float
    dense_linear_bytes: int
    head_share: float = 1.0


@dataclass(frozen=True)
class WindowQuality:
    """One window's results: mean KL, mean negative log-likelihoods (nats per token), agreement, density, the mean share
    of FFN bytes that a token read, the part of it due to refreshes, and the shares of attention's bytes and the
    head's."""

    kl: float
    nll: float
    dense_nll: float
    agreement: float
    density: float
    ffn_share: float
    refresh_share: float = 0.0
    attention_share: float = 1.0
    head_share: float = 1.0


def cut_windows(tokens: Sequence[int], prefix: Sequence[int], settings: TextSettings) -> list[list[int]]:
    """Cut a text into windows that do not overlap and are evenly spread over it.

    Args:
        tokens: The tokens of the whole text.
        prefix: The tokens that the tokenizer puts before a text (BOS); each window begins with them and counts them.
        settings: The number of windows and their lengths.

    Raises:
        TdaError: The text is too short for that many windows.
    """
    size = settings.window - len(prefix)
    if size < 1:
        raise TdaError(f"A window of {settings.window} tokens has no room for text. Raise --prompt-tokens.")
    there = len(tokens) // size
    if there < settings.prompts:
        raise TdaError(
            f"The text has {len(tokens)} tokens: {there} of {settings.prompts} windows of {settings.window}. "
            "Give a longer text, or lower --prompts, --prompt-tokens or --continuation-tokens."
        )
    starts = [window * there // settings.prompts * size for window in range(settings.prompts)]
    return [[*prefix, *tokens[start : start + size]] for start in starts]


def evaluate_text(
    artifact: Artifact,
    setting: AnySetting,
    windows: Sequence[Sequence[int]],
    settings: TextSettings,
    *,
    advance: Callable[[int], None] = lambda windows: None,
    ranks: Ranks = ALONE,
) -> TextQuality:
    """Measure a method on windows of a text.

    Args:
        artifact: The artifact on disk.
        setting: The method (`open_setting`).
        windows: N windows of `settings.window` token ids.
        settings: The lengths.
        advance: Called after every window.
        ranks: The ranks that share the windows; all return the same result.

    Raises:
        TdaError: A window is longer than the model's maximum, or logits are not finite.
    """
    check_lengths(artifact, settings)
    measured = []
    for found in ranks.in_order(windows, lambda window, together: measure_window(artifact, setting, window, settings)):
        measured.append(found)
        advance(1)
    return summarise(measured, artifact.dense_ffn_bytes, artifact.linear_bytes)


def check_lengths(artifact: Artifact, settings: TextSettings) -> None:
    """Refuse windows that are longer than the model's maximum.

    Raises:
        TdaError: The windows are too long.
    """
    if settings.window > artifact.shape.max_positions:
        raise TdaError(
            f"{settings.prompt_tokens} and {settings.continuation_tokens} tokens are more than the model's "
            f"{artifact.shape.max_positions} positions. Shorten one of them."
        )


def measure_window(
    artifact: Artifact, setting: AnySetting, window: Sequence[int], settings: TextSettings
) -> WindowQuality:
    """Measure a method on one window."""
    length = settings.prompt_tokens
    prompt, read, predicted = window[:length], window[length:-1], window[length + 1 :]
    cache = KvCache(artifact.shape, setting.sessions.provider, settings.window)
    reader = setting.open_reader(cache)
    _, mask = setting.read(prompt, cache, reader)
    counted = setting.decode_counted(cache, read, mask, reader)
    cache.truncate(length)  # the dense reading also starts after the dense prompt
    dense = decode(setting.sessions, cache, read, None)
    return counted_quality(artifact, dense, counted, predicted)


def counted_quality(artifact: Artifact, dense: np.ndarray, counted: Counted, predicted: Sequence[int]) -> WindowQuality:
    """Compare a method's result on a window's continuation with the dense logits, float32 [C, V].

    Raises:
        TdaError: Logits are not finite.
    """
    if not (np.isfinite(counted.logits).all() and np.isfinite(dense).all()):
        raise TdaError(f"{artifact.folder}: the logits are not finite. Build the artifact in another dtype.")
    quality = window_quality(dense, counted.logits, predicted, counted.density, counted.ffn_share)
    return replace(
        quality,
        refresh_share=counted.refresh_share,
        attention_share=counted.attention_share,
        head_share=counted.head_share,
    )


def window_quality(
    dense: np.ndarray,
    sparse: np.ndarray,
    predicted: Sequence[int],
    density: float,
    ffn_share: float,
) -> WindowQuality:
    """Compare the logits of a window's continuation, float32 [C, V], at the C predicted tokens."""
    log_p, log_q = log_softmax(dense), log_softmax(sparse)  # large arrays: computed once each
    return WindowQuality(
        kl=float(log_kl(log_p, log_q).mean()),
        nll=_nll(log_q, predicted),
        dense_nll=_nll(log_p, predicted),
        agreement=float((dense.argmax(axis=1) == sparse.argmax(axis=1)).mean()),
        density=density,
        ffn_share=ffn_share,
    )


def _nll(log_probs: np.ndarray, predicted: Sequence[int]) -> float:
    return float(-log_probs[np.arange(len(predicted)), list(predicted)].mean())


def summarise(measured: Sequence[WindowQuality], dense_ffn_bytes: int, dense_linear_bytes: int) -> TextQuality:
    """Average over windows; the standard error of exp(mean) is exp(mean) times the mean's own (delta method)."""
    kl, kl_error = _mean([window.kl for window in measured])
    nll, nll_error = _mean([window.nll for window in measured])
    dense_nll, dense_error = _mean([window.dense_nll for window in measured])
    agreement, agreement_error = _mean([window.agreement for window in measured])
    density, _ = _mean([window.density for window in measured])
    share, _ = _mean([window.ffn_share for window in measured])
    refresh, _ = _mean([window.refresh_share for window in measured])
    attention, _ = _mean([window.attention_share for window in measured])
    return TextQuality(
        prompts=len(measured),
        kl=kl,
        kl_stderr=kl_error,
        perplexity=math.exp(nll),
        perplexity_stderr=math.exp(nll) * nll_error,
        dense_perplexity=math.exp(dense_nll),
        dense_perplexity_stderr=math.exp(dense_nll) * dense_error,
        agreement=agreement,
        agreement_stderr=agreement_error,
        density=density,
        ffn_bytes=share * dense_ffn_bytes,
        refresh_ffn_bytes=refresh * dense_ffn_bytes,
        dense_ffn_bytes=dense_ffn_bytes,
        linear_bytes=linear_bytes(share, attention, dense_ffn_bytes, dense_linear_bytes),
        dense_linear_bytes=dense_linear_bytes,
        head_share=_mean([window.head_share for window in measured])[0],
    )


def linear_bytes(ffn_share: float, attention_share: float, dense_ffn_bytes: int, dense_linear_bytes: int) -> float:
    """Return the bytes read of the layers' linears, given the shares of the FFN's bytes and of attention's."""
    return ffn_share * dense_ffn_bytes + attention_share * (dense_linear_bytes - dense_ffn_bytes)


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))
