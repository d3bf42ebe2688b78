"""Free generation: how long a method writes the same text as the dense model, and how it drifts as a text grows.

Both generate greedily after a dense prompt, as in normal use, and continue past end tokens. The divergence length is
the number of new tokens before the first that differs. Drift is measured along the dense model's own text, so that all
methods are compared on the same tokens: decode reads it under the method, with its refreshes, and KL(dense || sparse)
is averaged over blocks of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tda_export.errors import TdaError, UsageError
from tda_export.evaluation.greedy import greedy_tokens, likeliest
from tda_export.evaluation.methods import AnySetting
from tda_export.evaluation.text import linear_bytes
from tda_export.ranks import ALONE, Ranks
from tda_export.runtime.artifact import Artifact
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import decode
from tda_export.runtime.scoring import token_kl
from tda_export.runtime.token_step import TokenStep

BLOCK_TOKENS = 64


@dataclass(frozen=True)
class FreeQuality:
    """Means over prompts, with standard errors over prompts.

    `divergence`: tokens before the first that differs, `new_tokens` where none does; `identical`: the share of prompts
    where none does. `kl`: KL in nats per token of each block of `block_tokens` tokens of the dense model's text.
    `ffn_bytes`: the mean FFN bytes that a token of that text reads, and `refresh_ffn_bytes` the part of them for
    refreshes; `linear_bytes`: the same for the linears of all layers, FFN and attention; `head_share`: the share of the
    head's bytes.
    """

    prompts: int
    new_tokens: int
    divergence: float
    divergence_stderr: float
    divergence_median: float
    identical: float
    block_tokens: int
    kl: list[float]
    kl_stderr: list[float]
    ffn_bytes: float
    refresh_ffn_bytes: float
    dense_ffn_bytes: int
    linear_bytes: float
    dense_linear_bytes: int
    head_share: float = 1.0


@dataclass(frozen=True)
class FreeText:
    """One prompt's results: divergence length in tokens, KL of each block, and shares of bytes (see `Counted`)."""

    divergence: int
    kl: np.ndarray  # float64 [blocks]
    ffn_share: float
    refresh_share: float
    attention_share: float
    head_share: float = 1.0


def evaluate_free(
    artifact: Artifact,
    setting: AnySetting,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    advance: Callable[[int], None] = lambda prompts: None,
    ranks: Ranks = ALONE,
) -> FreeQuality:
    """Let a method and the dense model continue prompts.

    Args:
        artifact: The artifact on disk.
        setting: The method (`open_setting`), which must be able to generate.
        prompts: N >= 2 prompts of token ids.
        new_tokens: The number of tokens to generate after each, at least 2.
        advance: Called after every prompt.
        ranks: The ranks that share the prompts; all return the same result.

    Raises:
        UsageError: The method does not generate, or the numbers are out of range.
        TdaError: A prompt and its new tokens are more than the model's maximum, or logits are not finite.
    """
    if new_tokens < 2 or len(prompts) < 2:
        raise UsageError("Free generation takes 2 prompts or more, and 2 new tokens or more.")
    measured = measure_free(artifact, setting, prompts, new_tokens, advance, ranks)
    return summarise_free(measured, new_tokens, artifact.dense_ffn_bytes, artifact.linear_bytes)


def measure_free(
    artifact: Artifact,
    setting: AnySetting,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    advance: Callable[[int], None] = lambda prompts: None,
    ranks: Ranks = ALONE,
) -> list[FreeText]:
    """Do the same as `evaluate_free` for any number of prompts, without averaging."""
    longest = max(len(prompt) for prompt in prompts) + new_tokens
    if longest > artifact.shape.max_positions:
        raise TdaError(
            f"{longest - new_tokens} and {new_tokens} tokens are more than the model's "
            f"{artifact.shape.max_positions} positions. Shorten one of them."
        )
    step = setting.open_step(longest)
    step.capture()
    cache = KvCache(artifact.shape, setting.sessions.provider, longest)
    reader = setting.open_reader(cache)

    def measure(prompt: Sequence[int], together: int) -> FreeText:
        dense = _write(artifact, setting, step, prompt, new_tokens, masked=False)
        sparse = _write(artifact, setting, step, prompt, new_tokens, masked=True)
        equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(dense, sparse, strict=True))
        return _drift(setting, cache, reader, prompt, dense, divergence=len(list(equal)))

    measured = []
    for found in ranks.in_order(prompts, measure):
        measured.append(found)
        advance(1)
    return measured


def _write(
    artifact: Artifact, setting: AnySetting, step: TokenStep, prompt: Sequence[int], count: int, *, masked: bool
) -> list[int]:
    step.cache.truncate(0)
    logits = step.begin(prompt, setting.deployment)
    step.follow(setting.deployment if masked and setting.masked else None)
    if masked:
        tokens = list(itertools.islice(greedy_tokens(setting, step, likeliest(logits)), count))
    else:
        tokens = [likeliest(logits)]
        while len(tokens) < count:
            tokens.append(step.greedy(tokens[-1]))
    if min(tokens) < 0:
        raise TdaError(f"{artifact.folder}: the logits are not finite. Build the artifact in another dtype.")
    return tokens


def _drift(
    setting: AnySetting, cache: KvCache, reader: Any, prompt: Sequence[int], text: Sequence[int], *, divergence: int
) -> FreeText:
    """Read the dense model's text under the method and densely. Nothing follows its last token, which predicts
    nothing."""
    read = text[:-1]
    cache.truncate(0)
    _, mask = setting.read(prompt, cache, reader)
    counted = setting.decode_counted(cache, read, mask, reader)
    cache.truncate(len(prompt))
    kl = token_kl(decode(setting.sessions, cache, read, None), counted.logits)
    blocks = [kl[start : start + BLOCK_TOKENS].mean() for start in range(0, len(kl), BLOCK_TOKENS)]
    shares = (counted.ffn_share, counted.refresh_share, counted.attention_share, counted.head_share)
    return FreeText(divergence, np.array(blocks), *shares)


def summarise_free(
    measured: Sequence[FreeText], new_tokens: int, dense_ffn_bytes: int, dense_linear_bytes: int
) -> FreeQuality:
    """Average over prompts."""
    ffn, attention = (
        float(np.mean([getattr(text, name) for text in measured])) for name in ("ffn_share", "attention_share")
    )
    lengths = np.array([text.divergence for text in measured], np.float64)
    blocks = np.stack([text.kl for text in measured])
    root = math.sqrt(len(measured))
    return FreeQuality(
        prompts=len(measured),
        new_tokens=new_tokens,
        divergence=float(lengths.mean()),
        divergence_stderr=float(lengths.std(ddof=1) / root),
        divergence_median=float(np.median(lengths)),
        identical=float((lengths == new_tokens).mean()),
        block_tokens=BLOCK_TOKENS,
        kl=blocks.mean(axis=0).tolist(),
        kl_stderr=(blocks.std(axis=0, ddof=1) / root).tolist(),
        ffn_bytes=ffn * dense_ffn_bytes,
        refresh_ffn_bytes=float(np.mean([text.refresh_share for text in measured])) * dense_ffn_bytes,
        dense_ffn_bytes=dense_ffn_bytes,
        linear_bytes=linear_bytes(ffn, attention, dense_ffn_bytes, dense_linear_bytes),
        dense_linear_bytes=dense_linear_bytes,
        head_share=float(np.mean([text.head_share for text in measured])),
    )
