"""How many of an FFN's weight bytes are read: what every figure of sparsity in this project means.

A neuron takes one row in each of the FFN's matrices, three with gates (gate, up, down) and two without (up, down). They
are numbers, NumPy arrays or tensors alike.
"""

from __future__ import annotations

from typing import Any

GATED = 3  # matrices of an FFN with gates
FFN_MATRICES = (2, GATED)


def two_level_share(mask: Any, token: Any, matrices: int) -> Any:
    """Return the share of FFN bytes that two-level decoding reads.

    Args:
        mask: Share of neurons in the mask, whose first row is read.
        token: Share of neurons that the token does not skip, whose other rows are read too.
        matrices: Of the FFN.
    """
    return (mask + (matrices - 1) * token) / matrices


def truncation_share(kept: Any, matrices: int) -> Any:
    """Return the share of FFN bytes that threshold truncation reads: all rows but the down rows of dropped neurons."""
    return (matrices - 1 + kept) / matrices
