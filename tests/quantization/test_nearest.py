"""Rounding a matrix by several threads is rounding it whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tda_export.quantization import nearest
from tda_export.quantization.nearest import decode, round_matrix
from tda_export.weights.formats import INTEGER_FORMATS, IntegerFormat, integer_format
from tda_export.weights.integers import FIELDS, round_to_nearest


@pytest.mark.parametrize("elements", [1, 300, 1 << 22])
@pytest.mark.parametrize("format", [integer_format(4), integer_format(8, 64)], ids=lambda format: format.name)
def test_pieces_are_the_whole(format: IntegerFormat, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "ELEMENTS_AT_ONCE", elements)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    rows = np.random.default_rng(0).standard_normal((37, 83)).astype(np.float32)
    for symmetric in (False, True):
        found, expected = (
            round_matrix("w", rows, format, symmetric=symmetric),
            round_to_nearest(rows, format, symmetric=symmetric),
        )
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))


@given(
    format=st.sampled_from(list(INTEGER_FORMATS.values())),
    size=st.tuples(st.integers(1, 9), st.integers(1, 150)),
    seed=st.integers(0, 9),
)
def test_decoding_in_pytorch_gives_the_same_bits(format: IntegerFormat, size: tuple[int, int], seed: int) -> None:
    rows = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    codes = round_to_nearest(rows, format)
    found = decode(codes)
    assert found.is_contiguous()
    np.testing.assert_array_equal(found.numpy(), codes.decode())
