"""`tda::Attention8`, attention to a cache of codes: the CPU kernel against its body and plain numpy."""

from __future__ import annotations

import platform
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.attention_model import AttentionForm, forms, random_attention, reference, run_attention, run_in_place
from tests.ffn_model import TOLERANCES
from tests.stored_attention import CLOSE, LENGTHS, NATIVE, check_codes, session

# ONNX Runtime computes float16 graphs in float32 on x86-64, but in float16 on ARM processors that have its arithmetic
# (errors of at most 0.0142 in QEMU).
BODY_CLOSE = TOLERANCES["float16"] * (8 if platform.machine() in ("aarch64", "arm64") else 1)
PLAIN = AttentionForm(kv="int8")


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(form=forms((16, 64, 80), kv="int8"), **LENGTHS)
def test_the_body_in_half_precision(form: AttentionForm, tokens: int, past: int, room: int | None, seed: int) -> None:
    """On the CPU, up to the precision of float16: codes of keys are those of rotated keys rounded to float16."""
    extra = None if room is None else past + tokens + room
    rng = np.random.default_rng(seed)
    feeds = random_attention(rng, form, tokens=tokens, past=past, room=extra, dtype="float16")
    call = session(form, native=False, dtype="float16", provider="CPUExecutionProvider")
    results = (run_attention if room is None else run_in_place)(call, feeds)
    assert results[0].dtype == np.float16
    check_codes(feeds, form, results, tokens, past, rounding=2**-10, close=BODY_CLOSE)


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(
    form=forms((16, 64, 80), kv="int8"), tokens=st.integers(1, 17), past=st.integers(0, 40), seed=st.integers(0, 2**16)
)
def test_values_have_the_codes_of_the_body(form: AttentionForm, tokens: int, past: int, seed: int) -> None:
    """To the bit, since values are rounded as they are."""
    feeds = random_attention(np.random.default_rng(seed), form, tokens=tokens, past=past)
    _, _, values, _, scales = run_attention(session(form), feeds)
    _, _, expected, _, expected_scales = run_attention(session(form, native=False), feeds)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(scales, expected_scales)


@pytest.mark.parametrize("native", NATIVE)
def test_heads_of_zeros_and_of_the_smallest_numbers(native: bool) -> None:
    """A scale of zero gives zeros. Subnormal numbers do no harm."""
    form = replace(PLAIN, rotary=False)
    feeds = random_attention(np.random.default_rng(0), form, tokens=3, past=5)
    feeds["key"][0, 0], feeds["value"][0, 0] = 0, 0
    feeds["key"][0, 1], feeds["value"][0, 1] = 1e-45, np.linspace(-1.9e-43, 1.9e-43, feeds["value"].shape[2])
    attended, *present = run_attention(session(form, native=native), feeds)
    for codes, scales in zip(present[:2], present[2:], strict=True):
        assert not codes[:, :, 5].any()
        assert not scales[:, :, 5].any()
        assert (codes.astype(int) >= -127).all()
    np.testing.assert_allclose(attended, reference(feeds, form, present), rtol=0, atol=CLOSE)


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize(
    ("name", "spoiled"),
    [(name, value) for name in ("query", "key", "value") for value in (np.nan, np.inf, -np.inf)]
    + [("past_key_scale", np.nan), ("past_value_scale", np.nan)],
)
def test_what_is_not_finite_reaches_the_results(name: str, spoiled: float, native: bool) -> None:
    """With the kernel, earlier tokens, and tokens whose window does not include it, are unchanged."""
    form = AttentionForm(heads=4, kv_heads=2, size=32, window=20, rotary=False, kv="int8")
    feeds = random_attention(np.random.default_rng(4), form, tokens=5, past=300)
    feeds[name][(0, 2, 37) if name in ("query", "key", "value") else (0, 1, 282)] = spoiled
    attended, *present = run_attention(session(form, native=native), feeds)
    whole = reference(feeds, form, present)
    seen = np.isfinite(whole)
    assert seen.any()
    if native:
        np.testing.assert_array_equal(np.isfinite(attended), seen)
        np.testing.assert_allclose(attended[seen], whole[seen], rtol=0, atol=CLOSE)
    else:  # the body multiplies values that a token does not attend to by zero, which keeps NaN
        assert name == "query" or not (np.isfinite(attended) & ~seen).any()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("past_key", (1, 4, 8, 16), r"past_key: expected shape \[1, 2, past, 16\], got \[1, 4, 8, 16\]"),
        ("past_key_scale", (1, 2, 9), r"past_key_scale: expected shape \[1, 2, 8\], got \[1, 2, 9\]"),
        ("past_value_scale", (1, 2, 8, 1), r"past_value_scale: expected shape \[1, 2, 8\], got \[1, 2, 8, 1\]"),
        ("last_index", (2,), r"last_index: expected one number, got shape \[2\]"),
        ("sin_cache", (11, 8), r"sin_cache: expected shape \[12, 8\], got \[11, 8\]"),
    ],
)
def test_shapes_that_do_not_fit(name: str, shape: tuple[int, ...], message: str) -> None:
    feeds = random_attention(np.random.default_rng(6), PLAIN, tokens=1, past=8)
    feeds[name] = np.ones(shape, feeds[name].dtype)
    with pytest.raises(Exception, match=f"tda::Attention8: {message}"):
        run_attention(session(PLAIN), feeds)
