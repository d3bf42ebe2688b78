"""Artifacts of random weights, for timing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tda_export.bench.artifact import scaled

MATRICES = st.lists(st.tuples(st.floats(0.05, 0.95), st.integers(1, 10**6)), min_size=1, max_size=6)


@given(MATRICES, st.floats(0.0, 1.0))
def test_scaled_shares_leave_unread_what_was_asked_for(matrices: list[tuple[float, int]], sparsity: float) -> None:
    unread = {str(i): share for i, (share, _) in enumerate(matrices)}
    size = {str(i): elements for i, (_, elements) in enumerate(matrices)}
    shares = scaled(unread, size, sparsity)
    assert all(-1e-12 <= share <= 1 + 1e-12 for share in shares.values())
    assert sum(shares[name] * size[name] for name in size) / sum(size.values()) == pytest.approx(sparsity, abs=1e-9)
    for name, share in unread.items():
        for other, larger in unread.items():
            assert share > larger or shares[name] <= shares[other] + 1e-12  # the order of the matrices stays
