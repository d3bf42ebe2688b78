"""The share of an FFN's weight bytes that is read. Every sparsity figure in this project is defined by it.

A neuron takes one row in each of the FFN's matrices: three with gates (gate, up, down), two without (up, down). All
functions take numbers, NumPy arrays or tensors.
"""

from __future__ import annotations

from typing import Any

GATED = 3  # matrices of an FFN with gates
FFN_MATRICES = (2, GATED)


def two_level_share(mask: Any, token: Any, matrices: int) -> Any:
    """Return the share of FFN bytes that two-level decoding reads.

    Args:
        mask: Share of neurons in the prompt mask. The first row of each is read.
        token: Share of neurons that the token does not skip. Their other rows are read too.
        matrices: Number of matrices of the FFN.
    """
    return (mask + (matrices - 1) * token) / matrices


def truncation_share(kept: Any, matrices: int) -> Any:
    """Return the share of FFN bytes that threshold truncation reads: all rows except the down rows of dropped
    neurons."""
    return (matrices - 1 + kept) / matrices
