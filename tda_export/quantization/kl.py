"""What a quantised model loses: its KL to the float model on continuations that quantisation did not use."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tda_export.calibration.divergence import agreement, mean_kl
from tda_export.errors import TdaError


@dataclass(frozen=True)
class Loss:
    """KL to the float model in nats per token, and the share of tokens where both have the same likeliest token.

    `stderr` is the standard error of `kl` over sequences, 0 for a single one.
    """

    kl: float
    stderr: float
    agreement: float
    tokens: int
    sequences: int

    def describe(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


@torch.no_grad()
def continuations(model: Any, tokens: torch.Tensor, prompt_tokens: int) -> Iterator[torch.Tensor]:
    """Yield the log-probabilities after each token of each continuation, float32 [C, V] on the CPU.

    Args:
        model: A transformers model in evaluation mode. It reads the prompts itself, too.
        tokens: int64 [N, P + C].
        prompt_tokens: P.
    """
    for sequence in tokens:
        kept = len(sequence) - prompt_tokens
        logits = model(sequence[None].to(model.device), use_cache=False, logits_to_keep=kept).logits[0]
        yield logits.float().log_softmax(dim=-1).cpu()


@dataclass(frozen=True)
class Compared:
    """One sequence's continuation: mean KL, agreement, and the number of tokens."""

    kl: float
    agreement: float
    tokens: int


def compare(p: torch.Tensor, q: torch.Tensor) -> Compared:
    """Compare log-probabilities [C, V] of the float model with the quantised model's.

    Raises:
        TdaError: The KL is not finite.
    """
    kl = float(mean_kl(p, q))
    if not math.isfinite(kl):
        raise TdaError(
            "The KL of the quantised model to the float model is not finite. Leave matrices float by "
            "--weights-for, or quantise to --weights int8."
        )
    return Compared(kl, agreement(p, q), len(p))


def summarise(compared: Sequence[Compared]) -> Loss:
    """Average over sequences."""
    values = torch.tensor([each.kl for each in compared], dtype=torch.float64)
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    # Between logits that are equal except for rounding, the KL may be below 0.
    mean = max(0.0, float(values.mean()))
    same = sum(each.agreement for each in compared) / len(compared)
    return Loss(mean, error, same, sum(each.tokens for each in compared), len(compared))


def loss(dense: list[torch.Tensor], quantised: Iterator[torch.Tensor]) -> Loss:
    """Compare log-probabilities [C, V] of the float model with the quantised model's, sequence by sequence.

    Raises:
        TdaError: A KL is not finite.
    """
    return summarise([compare(p, q) for p, q in zip(dense, quantised, strict=True)])
