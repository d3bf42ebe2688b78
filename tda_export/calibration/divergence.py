"""Divergence of two models' distributions over next tokens, in PyTorch (`runtime.scoring` has it in NumPy)."""

from __future__ import annotations

import torch


def mean_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Return the mean KL(p || q) in nats per token, a differentiable scalar, from log-probabilities float32 [C, V]."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()


def agreement(p: torch.Tensor, q: torch.Tensor) -> float:
    """Return the share of tokens with the same likeliest next token, from logits or log-probabilities [C, V]."""
    return float((p.argmax(dim=-1) == q.argmax(dim=-1)).double().mean())
