"""Square parts as the kernels add them: of 32 neighbouring columns, in the order of a warp's exchanges."""

from __future__ import annotations

import numpy as np

from tda_export.graph.operators import SQUARE_COLUMNS


def square_parts(sums: np.ndarray) -> np.ndarray:
    """Return the square parts, float32 [.., ceil(n / 32)], of sums [.., n] of any dtype, to the bit."""
    missing = -sums.shape[-1] % SQUARE_COLUMNS
    padded = np.pad(sums.astype(np.float32), [(0, 0)] * (sums.ndim - 1) + [(0, missing)])
    parts = (padded * padded).reshape(*padded.shape[:-1], -1, SQUARE_COLUMNS)
    lanes = np.arange(SQUARE_COLUMNS)
    for offset in (16, 8, 4, 2, 1):
        parts = parts + parts[..., lanes ^ offset]
    return np.ascontiguousarray(parts[..., 0])
