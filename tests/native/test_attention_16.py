"""`tda::Attention16`, attention to a cache of float16: the CPU kernel against its body and plain numpy."""

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
    unrounded_heads,
)
from tests.native.test_attention_8 import ALL_AT_ONCE as ALL_AT_ONCE_8
from tests.native.test_attention_8 import CLOSE, NATIVE, lengths

session = functools.cache(attention_session)
PLAIN = AttentionForm(kv="float16")
ALL_AT_ONCE = replace(ALL_AT_ONCE_8, kv="float16")
FORMS = [pytest.param(PLAIN, id="plain"), pytest.param(ALL_AT_ONCE, id="all-at-once")]


def check(
    feeds: Mapping[str, np.ndarray], form: AttentionForm, results: Sequence[np.ndarray], tokens: int, past: int
) -> None:
    """Check that the past is unchanged, new rows are the nearest float16, and tokens attend to what is stored."""
    attended, *present = results
    for name, whole, rows in zip(("past_key", "past_value"), present, unrounded_heads(feeds, form), strict=True):
        np.testing.assert_array_equal(whole[:, :, :past], feeds[name][:, :, :past])
        new = whole[0, :, past : past + tokens].swapaxes(0, 1).astype(np.float64)  # [S, KV, D]
        np.testing.assert_allclose(new, rows, rtol=2**-11 + 1e-5, atol=2**-25 + 1e-6)
    np.testing.assert_allclose(attended, reference(feeds, form, present), rtol=0, atol=CLOSE)


@pytest.mark.parametrize("native", NATIVE)
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(form=forms((16, 32, 64, 80, 128), kv="float16"), **lengths)
def test_it_attends_to_the_nearest_numbers(
    native: bool, form: AttentionForm, tokens: int, past: int, room: int | None, seed: int
) -> None:
    """In a growing cache, and in one of fixed room."""
    extra = None if room is None else past + tokens + room
    feeds = random_attention(np.random.default_rng(seed), form, tokens=tokens, past=past, room=extra)
    results = (run_attention if room is None else run_in_place)(session(form, native=native), feeds)
    check(feeds, form, results, tokens, past)


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(form=forms((2, 6, 7, 24, 40, 72), kv="float16"), **lengths)
def test_heads_of_any_size(form: AttentionForm, tokens: int, past: int, room: int | None, seed: int) -> None:
    """Also sizes that ONNX Runtime's kernel refuses. In odd sizes the last element is not rotated."""
    extra = None if room is None else past + tokens + room
    feeds = random_attention(np.random.default_rng(seed), form, tokens=tokens, past=past, room=extra)
    results = (run_attention if room is None else run_in_place)(session(form), feeds)
    check(feeds, form, results, tokens, past)


def halfway(half: int) -> float:
    """Return the mean of the float16 with these bits and the next one."""
    return float(np.arange(half, half + 2, dtype=np.uint16).view(np.float16).astype(np.float64).mean())


@settings(max_examples=100)
@given(
    values=st.lists(
        st.one_of(
            st.floats(width=32),
            st.floats(-2, 2, width=32),
            st.integers(0, 2**15 - 1).map(lambda half: float(np.uint16(half).view(np.float16))),
            # Halfway between two float16, where ties go to the even one.
            st.integers(0, 0x7BFE).map(halfway),
            st.sampled_from([65519.996, 65520.0, -65520.0, 2.0**-25, 2.0**-24, -(2.0**-26), np.inf, np.nan]),
        ),
        min_size=1,
        max_size=16,
    )
)
def test_values_are_rounded_as_ieee_754_says(values: list[float]) -> None:
    form = replace(PLAIN, heads=1, kv_heads=1, rotary=False)
    feeds = random_attention(np.random.default_rng(0), form, tokens=1, past=0)
    feeds["value"][0, 0, : len(values)] = values
    _, _, stored = run_attention(session(form), feeds)
    with np.errstate(over="ignore"):
        expected = feeds["value"][0, 0].astype(np.float16)
    spoiled = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(stored[0, 0, 0]), spoiled)
    np.testing.assert_array_equal(stored[0, 0, 0].view(np.uint16)[~spoiled], expected.view(np.uint16)[~spoiled])


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("form", FORMS)
def test_steps_are_one_call(form: AttentionForm, native: bool) -> None:
    """A prompt and steps after it, in one buffer, give the result of a call with all tokens."""
    call, tokens = session(form, native=native), 300
    feeds = random_attention(np.random.default_rng(0), form, tokens=tokens, past=0)
    whole, *present = run_attention(call, feeds)
    cache = {name: np.zeros((1, form.kv_heads, tokens, form.size), np.float16) for name in ("past_key", "past_value")}
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
@pytest.mark.parametrize("form", FORMS)
def test_a_token_alone_gives_the_same_bits(form: AttentionForm, threads: int) -> None:
    """For any number of threads, other tokens of the call, and room of the cache."""
    feeds = random_attention(np.random.default_rng(2), form, tokens=37, past=600)
    together, *present = run_attention(session(form), feeds)
    behind = [np.concatenate([part, np.full_like(part, np.nan)], 2) for part in present]
    call = attention_session(form, threads=threads)
    for t in (0, 1, 15, 16, 36):
        alone = feeds | dict(zip(("past_key", "past_value"), behind, strict=True))
        alone |= {"last_index": np.array([600 + t], np.int32)}
        alone |= {name: feeds[name][:, t : t + 1] for name in ("query", "key", "value") if name in feeds}
        attended, *held = run_in_place(call, alone)
        np.testing.assert_array_equal(attended[:, 0], together[:, t])
        for result, expected in zip(held, behind, strict=True):
            np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("spoiled", [np.nan, np.inf, 7e4])
@pytest.mark.parametrize("name", ["key", "value"])
def test_what_float16_does_not_hold_reaches_the_results(name: str, spoiled: float, native: bool) -> None:
    form = AttentionForm(heads=4, kv_heads=2, size=32, rotary=False, kv="float16")
    feeds = random_attention(np.random.default_rng(4), form, tokens=5, past=300)
    feeds[name][0, 2, 37] = spoiled  # the second key-value head
    attended, *present = run_attention(session(form, native=native), feeds)
    whole = reference(feeds, form, present)
    seen = np.isfinite(whole)
    assert seen.any()
    assert not seen.all()
    if native:
        np.testing.assert_array_equal(np.isfinite(attended), seen)
        np.testing.assert_allclose(attended[seen], whole[seen], rtol=0, atol=CLOSE)
    else:  # the body multiplies values that a token does not attend to by zero, which keeps NaN
        assert not (np.isfinite(attended) & ~seen).any()
