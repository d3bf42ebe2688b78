"""Log-likelihoods of continuations by a protocol: which tokens are read densely, and which are decoded sparsely.

A context has n tokens and a continuation m, so the model reads n + m - 1 tokens, and the last m of them predict.

- `strict`: prefill reads the first n - 1 tokens of the context densely and gives the mask; decode reads the context's
  last token and the continuation under it. All m predictions come from sparse steps. Continuations of one context
  share its prefill.
- `griffin`: as Griffin's published code scores (arXiv 2404.01365): all tokens except the last are read densely and give
  the prompt mask; only the last step is sparse. For m = 1 both protocols are the same.

Answers are short, so nothing is refreshed while they are scored. A context of one token (BOS or EOS for an empty
context) leaves prefill nothing to read, so there is no prompt mask, and the continuation is scored densely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from tda_export.errors import TdaError, UsageError
from tda_export.evaluation.methods import AnySetting
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import PromptMask

Protocol = Literal["strict", "griffin"]
DECODE_TOKENS = 128  # tokens of one call, whose logits are on the host at once
CAPACITY_STEP = 256


@dataclass(frozen=True)
class Score:
    """A continuation's score: the sum of its tokens' log-probabilities in nats, and whether each is the likeliest."""

    loglikelihood: float
    greedy: bool


class Scorer:
    """Scores continuations by a method and a protocol, in one cache that grows to the longest of them."""

    def __init__(self, setting: AnySetting, protocol: str = "strict") -> None:
        """Prepare scoring.

        Raises:
            UsageError: The protocol is unknown.
        """
        if protocol not in get_args(Protocol):
            raise UsageError(f"Protocol {protocol!r} is not known. Use {' or '.join(get_args(Protocol))}.")
        self.setting, self.protocol = setting.without_refresh(), protocol
        self._shares: list[tuple[float, float, float]] = []
        self._mask_share = 1.0  # share read under the last context's mask, where all tokens read the same
        self._cache = KvCache(setting.shape, setting.sessions.provider, 1)
        self._reader: Any = None

    def take_shares(self) -> tuple[float, float, float] | None:
        """Return the mean shares of FFN bytes, of attention's bytes and of the head's that a token scored since the
        last call read; None if there was none.

        The shares are 1 for tokens that are scored densely, by the protocol or after a context of one token.
        """
        shares, self._shares = self._shares, []
        if not shares:
            return None
        ffn, attention, head = np.mean(shares, axis=0)
        return float(ffn), float(attention), float(head)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens to read: n + m - 1."""
        if self._reader is None or self._cache.capacity < tokens:
            longest = self.setting.shape.max_positions
            capacity = max(tokens, min(-(-tokens // CAPACITY_STEP) * CAPACITY_STEP, longest))
            self._cache = KvCache(self.setting.shape, self.setting.sessions.provider, capacity)
            self._reader = self.setting.open_reader(self._cache)

    def score(self, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Score]:
        """Score continuations of one context.

        Args:
            context: n token ids, at least one.
            continuations: Token ids, at least one for each.

        Raises:
            TdaError: Logits are not finite.
        """
        assert context
        assert all(continuations)
        self.reserve(len(context) + max(map(len, continuations)) - 1)
        if self.protocol == "griffin":
            return [self._score_last_step(context, continuation) for continuation in continuations]
        mask = self._read(context[:-1])
        # Continuations that differ only in the last token (answers A, B, C): the same steps predict them all.
        fed: dict[tuple[int, ...], list[int]] = {}
        for index, continuation in enumerate(continuations):
            fed.setdefault((context[-1], *continuation[:-1]), []).append(index)
        scores: dict[int, Score] = {}
        for tokens, indices in fed.items():
            self._cache.truncate(len(context) - 1)
            scores |= zip(indices, self._decode(tokens, [continuations[i] for i in indices], mask), strict=True)
        return [scores[index] for index in range(len(continuations))]

    def _score_last_step(self, context: Sequence[int], continuation: Sequence[int]) -> Score:
        tokens = [*context, *continuation[:-1]]
        mask = self._read(tokens[:-1])
        dense = Score(0.0, True)
        if len(continuation) > 1:  # their keys and values are written again, unchanged
            self._cache.truncate(len(context) - 1)
            (dense,) = self._decode(tokens[len(context) - 1 : -1], [continuation[:-1]], None)
        (last,) = self._decode(tokens[-1:], [continuation[-1:]], mask)
        return Score(dense.loglikelihood + last.loglikelihood, dense.greedy and last.greedy)

    def _read(self, tokens: Sequence[int]) -> PromptMask | None:
        """Read a context densely from its beginning, and return its prompt mask; None where there is nothing to
        read."""
        self._cache.truncate(0)
        if not tokens:
            return None
        _, mask = self.setting.read(tokens, self._cache, self._reader)
        if not self.setting.per_token:
            self._mask_share = self.setting.density(mask)
        return mask

    def _decode(
        self, tokens: Sequence[int], predicted: Sequence[Sequence[int]], mask: PromptMask | None
    ) -> list[Score]:
        """Decode S tokens, and score several predictions of S tokens from the same logits."""
        sums, greedy = np.zeros(len(predicted)), np.ones(len(predicted), bool)
        targets = np.asarray(predicted)  # [N, S]
        for start in range(0, len(tokens), DECODE_TOKENS):
            piece = tokens[start : start + DECODE_TOKENS]
            if mask is not None and self.setting.per_token:
                counted = self.setting.decode_counted(self._cache, piece, mask)  # [C, V]
                logits, share = counted.logits, (counted.sparse_share, counted.attention_share, counted.head_share)
            else:
                logits = self.setting.decode(self._cache, piece, mask)
                share = (1.0 if mask is None else self._mask_share, 1.0, 1.0)
            self._shares += [share] * len(piece)
            wanted = targets[:, start : start + len(piece)]  # [N, C]
            sums += token_log_probabilities(logits, wanted).sum(axis=1)
            greedy &= (wanted == logits.argmax(axis=1)).all(axis=1)
        return [Score(float(total), bool(likeliest)) for total, likeliest in zip(sums, greedy, strict=True)]


def token_log_probabilities(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return the log-probabilities of tokens [N, C] under logits float32 [C, V], float64 [N, C].

    Only sums are float64: with a vocabulary of 128,000, converting all logits took the host longer than a GPU's step.

    Raises:
        TdaError: Logits are not finite.
    """
    largest = logits.max(axis=1)  # [C]
    with np.errstate(invalid="ignore"):
        total = np.exp(logits - largest[:, None]).sum(axis=1, dtype=np.float64)
    if not (np.isfinite(largest).all() and np.isfinite(total).all()):
        raise TdaError("The logits are not finite. Build the artifact in another dtype.")
    chosen = logits[np.arange(len(logits)), tokens].astype(np.float64)  # [N, C]
    return chosen - (largest + np.log(total))
