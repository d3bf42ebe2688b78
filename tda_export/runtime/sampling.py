"""Choose the next token from logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from tda_export.errors import UsageError

Sampler = Callable[[np.ndarray], int]  # logits float [V] -> token
LEAST_PENALTY, MOST_PENALTY = 0.01, 100.0


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off; a `seed` makes it repeatable.
    `repetition_penalty` 1 is off; the penalty also applies to greedy choices.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"Temperature {self.temperature} is negative or not finite. Give 0 (greedy) or more.")
        if self.top_k < 0:
            raise UsageError(f"top-k {self.top_k} is negative. Give 0 (off) or more.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p {self.top_p} is outside (0, 1]. Give 1 (off) or a smaller fraction.")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min-p {self.min_p} is outside [0, 1]. Give 0 (off) or a fraction.")
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"Seed {self.seed} is negative. Give 0 or more.")
        if not LEAST_PENALTY <= self.repetition_penalty <= MOST_PENALTY:
            raise UsageError(
                f"Repetition penalty {self.repetition_penalty} is outside [{LEAST_PENALTY}, {MOST_PENALTY}]. "
                "Give 1 (off) or a little more."
            )


def make_sampler(sampling: Sampling) -> Sampler | None:
    """Compose the steps that `sampling` asks for: temperature, top-k, top-p, min-p, then a draw; None is greedy."""
    if sampling.temperature == 0:
        return None
    generator = np.random.default_rng(sampling.seed)

    def sample(logits: np.ndarray) -> int:
        # Shifted first: the largest stays finite at any temperature, and the others may become -inf.
        with np.errstate(over="ignore"):
            scaled = (logits - logits.max()).astype(np.float64) / sampling.temperature
        scaled = keep_top_k(scaled, sampling.top_k)
        probabilities = keep_min_p(keep_top_p(softmax(scaled), sampling.top_p), sampling.min_p)
        return int(generator.choice(len(probabilities), p=probabilities))

    return sample


class RepetitionPenalty:
    """Makes tokens that occurred before, in the prompt too, less likely: their logits are divided by the penalty where
    positive and multiplied by it where negative, as in transformers.

    Source: CTRL, section 4.1 (arXiv 1909.05858).
    """

    def __init__(self, penalty: float, vocab_size: int, tokens: Iterable[int]) -> None:
        self._penalty = penalty
        self._seen = np.zeros(vocab_size, bool)
        self._seen[list(tokens)] = True

    def add(self, token: int) -> None:
        """Record that a token occurred."""
        self._seen[token] = True

    def apply(self, logits: np.ndarray) -> np.ndarray:
        """Return the penalised logits, float64 [V], finite where `logits` are; `logits` is not changed."""
        logits = logits.astype(np.float64)  # no penalty in its range overflows float64
        penalised = np.where(logits > 0, logits / self._penalty, logits * self._penalty)
        return np.where(self._seen, penalised, logits)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return exp(logits) normalised to sum 1, float64 [V]."""
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def keep_top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """Set all but the k largest logits to -inf; logits equal to the k-th are kept. k = 0 keeps all."""
    if not 0 < k < len(logits):
        return logits
    border = np.partition(logits, -k)[-k]
    return np.where(logits >= border, logits, -np.inf)


def keep_top_p(probabilities: np.ndarray, p: float) -> np.ndarray:
    """Keep the smallest set of likeliest tokens that reaches p, renormalised (nucleus sampling, arXiv 1904.09751)."""
    if p >= 1:
        return probabilities
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    kept = np.zeros_like(probabilities)
    chosen = order[before < p]
    kept[chosen] = probabilities[chosen]
    return kept / kept.sum()


def keep_min_p(probabilities: np.ndarray, p: float) -> np.ndarray:
    """Keep tokens at least p times as likely as the likeliest, renormalised (arXiv 2407.01082). p = 0 keeps all."""
    if p == 0:
        return probabilities
    kept = np.where(probabilities >= p * probabilities.max(), probabilities, 0.0)
    return kept / kept.sum()
