"""Attention to caches of int8 and float16, what both have in common: the CPU kernel against its body and plain
numpy."""

from __future__ import annotations

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
    run_attention,
    run_in_place,
)
from tests.stored_attention import CHECKS, CLOSE, LENGTHS, NATIVE, cache_names, session

FORMATS = sorted(CHECKS)
ALL_AT_ONCE = AttentionForm(heads=6, kv_heads=2, size=48, packed=True, window=150, scale=0.3, softcap=2.0)
FORMS = [
    pytest.param(replace(form, kv=kv), id=f"{kv}-{name}")
    for kv in FORMATS
    for name, form in (("plain", AttentionForm()), ("all-at-once", ALL_AT_ONCE))
]


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("kv", FORMATS)
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), **LENGTHS)
def test_it_attends_to_the_nearest_numbers(
    kv: str, native: bool, data: st.DataObject, tokens: int, past: int, room: int | None, seed: int
) -> None:
    """In a growing cache, and in one of fixed room."""
    form = data.draw(forms((16, 32, 64, 80, 128), kv=kv))
    extra = None if room is None else past + tokens + room
    feeds = random_attention(np.random.default_rng(seed), form, tokens=tokens, past=past, room=extra)
    results = (run_attention if room is None else run_in_place)(session(form, native=native), feeds)
    CHECKS[kv](feeds, form, results, tokens, past)


@pytest.mark.parametrize("kv", FORMATS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), **LENGTHS)
def test_heads_of_any_size(kv: str, data: st.DataObject, tokens: int, past: int, room: int | None, seed: int) -> None:
    """Also sizes that ONNX Runtime's kernel refuses. In odd sizes the last element is not rotated."""
    form = data.draw(forms((2, 6, 7, 24, 40, 72), kv=kv))
    extra = None if room is None else past + tokens + room
    feeds = random_attention(np.random.default_rng(seed), form, tokens=tokens, past=past, room=extra)
    results = (run_attention if room is None else run_in_place)(session(form), feeds)
    CHECKS[kv](feeds, form, results, tokens, past)


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("form", FORMS)
def test_steps_are_one_call(form: AttentionForm, native: bool) -> None:
    """A prompt and steps after it, in one buffer, give the result of a call with all tokens, as all attend to what is
    stored."""
    call, tokens = session(form, native=native), 300
    feeds = random_attention(np.random.default_rng(0), form, tokens=tokens, past=0)
    whole, *present = run_attention(call, feeds)
    cache = {name: np.zeros_like(part) for name, part in zip(cache_names(form), present, strict=True)}
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
    behind = [
        np.concatenate([part, np.full_like(part, 99 if part.dtype == np.int8 else np.nan)], 2) for part in present
    ]
    call = attention_session(form, threads=threads)
    for t in (0, 1, 15, 16, 36):
        alone = feeds | dict(zip(cache_names(form), behind, strict=True))
        alone |= {"last_index": np.array([600 + t], np.int32)}
        alone |= {name: feeds[name][:, t : t + 1] for name in ("query", "key", "value") if name in feeds}
        attended, *held = run_in_place(call, alone)
        np.testing.assert_array_equal(attended[:, 0], together[:, t])
        for result, expected in zip(held, behind, strict=True):
            np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("kv", FORMATS)
def test_padding_behind_a_prompt(kv: str, native: bool) -> None:
    form = AttentionForm(window=9, kv=kv)
    feeds = random_attention(np.random.default_rng(1), form, tokens=30, past=0)
    whole = run_attention(session(form, native=native), feeds)[0]
    feeds["last_index"] = np.array([19], np.int32)
    padded = run_attention(session(form, native=native), feeds)[0]
    np.testing.assert_allclose(padded[:, :20], whole[:, :20], rtol=0, atol=CLOSE)


@pytest.mark.parametrize("kv", FORMATS)
def test_no_tokens(kv: str) -> None:
    form = AttentionForm(kv=kv)
    feeds = random_attention(np.random.default_rng(5), form, tokens=0, past=4)
    attended, *present = run_attention(session(form), feeds)
    assert attended.shape == (1, 0, 64)
    for name, value in zip(cache_names(form), present, strict=True):
        np.testing.assert_array_equal(value, feeds[name])
