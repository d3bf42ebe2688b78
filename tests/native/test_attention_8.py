"""`tda::Attention8`, attention to a cache of codes: the CPU kernel against its body and plain numpy."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.attention_model import (
    AttentionForm,
    attention_session,
    forms,
    random_attention,
    reference,
    run_attention,
    run_in_place,
    unrounded,
)
from tests.ffn_model import TOLERANCES

session = functools.cache(attention_session)
NATIVE = [pytest.param(False, id="body"), pytest.param(True, id="cpu")]
CLOSE = 1e-5  # tolerance for float32 values of order one
PLAIN = AttentionForm(kv="int8")
ALL_AT_ONCE = AttentionForm(heads=6, kv_heads=2, size=48, packed=True, window=150, scale=0.3, softcap=2.0, kv="int8")


lengths = {
    "tokens": st.one_of(st.just(1), st.integers(1, 17), st.just(40)),
    "past": st.one_of(st.just(0), st.integers(1, 40), st.sampled_from([255, 256, 257, 700])),
    "room": st.sampled_from([None, 0, 1, 300]),
    "seed": st.integers(0, 2**16),
}


def check(
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
    names = ("past_key", "past_value", "past_key_scale", "past_value_scale")
    for name, whole in zip(names, present, strict=True):
        np.testing.assert_array_equal(whole[:, :, :past], feeds[name][:, :, :past])
    new = [whole[0, :, past : past + tokens].swapaxes(0, 1) for whole in present]
    for found, scale, (codes, scales) in zip(new[:2], new[2:], unrounded(feeds, form), strict=True):
        np.testing.assert_allclose(scale, scales, rtol=rounding)
        np.testing.assert_allclose(found, codes, rtol=0, atol=0.5 + 127 * rounding)
        assert np.abs(found.astype(int)).max(initial=0) <= 127
    expected = reference(feeds, form, present)
    atol = close * max(1.0, float(np.abs(expected).max(initial=0.0)))
    np.testing.assert_allclose(attended.astype(np.float64), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("native", NATIVE)
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(form=forms((16, 32, 64, 80, 128), kv="int8"), **lengths)
def test_it_attends_to_the_nearest_codes(
    native: bool, form: AttentionForm, tokens: int, past: int, room: int | None, seed: int
) -> None:
    """In a growing cache, and in one of fixed room."""
    extra = None if room is None else past + tokens + room
    feeds = random_attention(np.random.default_rng(seed), form, tokens=tokens, past=past, room=extra)
    results = (run_attention if room is None else run_in_place)(session(form, native=native), feeds)
    check(feeds, form, results, tokens, past)


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(form=forms((2, 6, 7, 24, 40, 72), kv="int8"), **lengths)
def test_heads_of_any_size(form: AttentionForm, tokens: int, past: int, room: int | None, seed: int) -> None:
    """Also sizes that ONNX Runtime's kernel refuses. In odd sizes the last element is not rotated."""
    extra = None if room is None else past + tokens + room
    feeds = random_attention(np.random.default_rng(seed), form, tokens=tokens, past=past, room=extra)
    results = (run_attention if room is None else run_in_place)(session(form), feeds)
    check(feeds, form, results, tokens, past)


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(form=forms((16, 64, 80), kv="int8"), **lengths)
def test_the_body_in_half_precision(form: AttentionForm, tokens: int, past: int, room: int | None, seed: int) -> None:
    """On the CPU, up to the precision of float16: codes of keys are those of rotated keys rounded to float16."""
    extra = None if room is None else past + tokens + room
    rng = np.random.default_rng(seed)
    feeds = random_attention(rng, form, tokens=tokens, past=past, room=extra, dtype="float16")
    call = session(form, native=False, dtype="float16", provider="CPUExecutionProvider")
    results = (run_attention if room is None else run_in_place)(call, feeds)
    assert results[0].dtype == np.float16
    check(feeds, form, results, tokens, past, rounding=2**-10, close=TOLERANCES["float16"])


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
@pytest.mark.parametrize("form", [PLAIN, ALL_AT_ONCE], ids=["plain", "all-at-once"])
def test_steps_are_one_call(form: AttentionForm, native: bool) -> None:
    """A prompt and steps after it, in one buffer, give the result of a call with all tokens, as all attend to codes."""
    call, tokens = session(form, native=native), 300
    feeds = random_attention(np.random.default_rng(0), form, tokens=tokens, past=0)
    whole, *present = run_attention(call, feeds)
    cache = {name: np.zeros((1, form.kv_heads, tokens, form.size), np.int8) for name in ("past_key", "past_value")}
    cache |= {f"{name}_scale": np.zeros((1, form.kv_heads, tokens), np.float32) for name in cache}
    start = 0
    for length in (200, 80, *[1] * 20):
        end = start + length
        piece = feeds | cache | {"last_index": np.array([end - 1], np.int32), "buffer": np.array(tokens, np.int32)}
        piece |= {name: feeds[name][:, start:end] for name in ("query", "key", "value") if name in feeds}
        attended, *held = run_in_place(call, piece)
        cache = dict(zip(cache, held, strict=True))
        np.testing.assert_allclose(attended, whole[:, start:end], rtol=0, atol=CLOSE)
        start = end
    for result, expected in zip(cache.values(), present, strict=True):
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("form", [PLAIN, ALL_AT_ONCE], ids=["plain", "all-at-once"])
def test_a_token_alone_gives_the_same_bits(form: AttentionForm, threads: int) -> None:
    """For any number of threads, other tokens of the call, and room of the cache."""
    feeds = random_attention(np.random.default_rng(2), form, tokens=37, past=600)
    together, *present = run_attention(session(form), feeds)
    names = ("past_key", "past_value", "past_key_scale", "past_value_scale")
    behind = [
        np.concatenate([part, np.full_like(part, 99 if part.dtype == np.int8 else np.nan)], 2) for part in present
    ]
    call = attention_session(form, threads=threads)
    for t in (0, 1, 15, 16, 36):
        alone = feeds | dict(zip(names, behind, strict=True)) | {"last_index": np.array([600 + t], np.int32)}
        alone |= {name: feeds[name][:, t : t + 1] for name in ("query", "key", "value") if name in feeds}
        attended, *held = run_in_place(call, alone)
        np.testing.assert_array_equal(attended[:, 0], together[:, t])
        for result, expected in zip(held, behind, strict=True):
            np.testing.assert_array_equal(result, expected)


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


@pytest.mark.parametrize("native", NATIVE)
def test_padding_behind_a_prompt(native: bool) -> None:
    form = replace(PLAIN, window=9)
    feeds = random_attention(np.random.default_rng(1), form, tokens=30, past=0)
    whole = run_attention(session(form, native=native), feeds)[0]
    feeds["last_index"] = np.array([19], np.int32)
    padded = run_attention(session(form, native=native), feeds)[0]
    np.testing.assert_allclose(padded[:, :20], whole[:, :20], rtol=0, atol=CLOSE)


def test_no_tokens() -> None:
    feeds = random_attention(np.random.default_rng(5), PLAIN, tokens=0, past=4)
    attended, *present = run_attention(session(PLAIN), feeds)
    assert attended.shape == (1, 0, 64)
    for name, value in zip(("past_key", "past_value", "past_key_scale", "past_value_scale"), present, strict=True):
        np.testing.assert_array_equal(value, feeds[name])


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
