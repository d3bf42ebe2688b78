"""What the tests of attention to int8 and float16 caches share: forms, lengths, and checks of results."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import strategies as st

from tda_export.graph import kv_formats
from tests.attention_model import AttentionForm, attention_session, reference, unrounded, unrounded_heads

session = functools.cache(attention_session)
NATIVE = [pytest.param(False, id="body"), pytest.param(True, id="cpu")]
CLOSE = 1e-5  # tolerance for float32 values of order one
LENGTHS: dict[str, st.SearchStrategy] = {
    "tokens": st.one_of(st.just(1), st.integers(1, 17), st.just(40)),
    "past": st.one_of(st.just(0), st.integers(1, 40), st.sampled_from([255, 256, 257, 700])),
    "room": st.sampled_from([None, 0, 1, 300]),
    "seed": st.integers(0, 2**16),
}


def cache_names(form: AttentionForm) -> list[str]:
    """Name the tensors of the past, in order."""
    return [name for name in form.inputs if name.startswith("past_")]


def check_codes(
    feeds: Mapping[str, np.ndarray],
    form: AttentionForm,
    results: Sequence[np.ndarray],
    tokens: int,
    past: int,
    *,
    rounding: float = 1e-5,
    close: float = CLOSE,
) -> None:
    """Check that the past is unchanged, new codes are the nearest, and tokens attend to the codes in the cache.

    Keys are rounded by `rounding`, relative to the largest element, before they are rounded to codes. Results may be
    `close` from the reference, relative to the largest or to 1.
    """
    attended, *present = results
    _check_past(feeds, form, present, past)
    new = [whole[0, :, past : past + tokens].swapaxes(0, 1) for whole in present]
    for found, scale, (codes, scales) in zip(new[:2], new[2:], unrounded(feeds, form), strict=True):
        np.testing.assert_allclose(scale, scales, rtol=rounding)
        np.testing.assert_allclose(found, codes, rtol=0, atol=0.5 + 127 * rounding)
        assert np.abs(found.astype(int)).max(initial=0) <= 127
    expected = reference(feeds, form, present)
    atol = close * max(1.0, float(np.abs(expected).max(initial=0.0)))
    np.testing.assert_allclose(attended.astype(np.float64), expected, rtol=0, atol=atol)


def check_halves(
    feeds: Mapping[str, np.ndarray], form: AttentionForm, results: Sequence[np.ndarray], tokens: int, past: int
) -> None:
    """Check that the past is unchanged, new rows are the nearest float16, and tokens attend to what is stored."""
    attended, *present = results
    _check_past(feeds, form, present, past)
    for whole, rows in zip(present, unrounded_heads(feeds, form), strict=True):
        new = whole[0, :, past : past + tokens].swapaxes(0, 1).astype(np.float64)  # [S, KV, D]
        np.testing.assert_allclose(new, rows, rtol=2**-11 + 1e-5, atol=2**-25 + 1e-6)
    np.testing.assert_allclose(attended, reference(feeds, form, present), rtol=0, atol=CLOSE)


def _check_past(feeds: Mapping[str, np.ndarray], form: AttentionForm, present: Sequence[np.ndarray], past: int) -> None:
    for name, whole in zip(cache_names(form), present, strict=True):
        np.testing.assert_array_equal(whole[:, :, :past], feeds[name][:, :, :past])


CHECKS: dict[str, Callable[..., None]] = {kv_formats.KV_INT8: check_codes, kv_formats.KV_FLOAT16: check_halves}
