"""How far a model's distributions over next tokens are from another's, in PyTorch: `runtime.scoring` has NumPy."""

from __future__ import annotations

import torch


def mean_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Return KL(p || q) in nats a token, a scalar, from log-probabilities float32 [C, V]. Gradients pass."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()


def agreement(p: torch.Tensor, q: torch.Tensor) -> float:
    """Return the share of tokens whose likeliest next token is the same; logits or log-probabilities [C, V]."""
    return float((p.argmax(dim=-1) == q.argmax(dim=-1)).double().mean())
