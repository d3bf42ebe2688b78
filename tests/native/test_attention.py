"""The native kernel of `tda::Attention` on the CPU against its body, GroupQueryAttention, and plain numpy."""

from __future__ import annotations

import functools
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
)

session = functools.cache(attention_session)
NATIVE = [pytest.param(False, id="body"), pytest.param(True, id="cpu")]
CLOSE = 1e-5  # tolerance for float32 values of order one
PLAIN = AttentionForm()
ALL_AT_ONCE = AttentionForm(heads=6, kv_heads=2, size=48, packed=True, window=150, scale=0.3, softcap=2.0)


lengths = {
    "tokens": st.sampled_from([1, 1, 1, 2, 5, 16, 17, 40]),
    "past": st.one_of(st.just(0), st.integers(1, 40), st.sampled_from([255, 256, 257, 700])),
    "room": st.sampled_from([None, 0, 1, 300]),
    "seed": st.integers(0, 2**16),
}


@settings(max_examples=250, suppress_health_check=[HealthCheck.too_slow])
@given(form=forms((16, 32, 64, 80, 128)), whole=st.booleans(), **lengths)
def test_it_is_what_the_body_computes_on_the_cpu(
    form: AttentionForm, whole: bool, tokens: int, past: int, room: int | None, seed: int
) -> None:
    """With a growing cache, present keys and values agree too. In a fixed one, memory behind them is unchanged."""
    feeds = random_attention(
        np.random.default_rng(seed),
        form,
        tokens=tokens,
        past=past,
        room=None if room is None else past + tokens + room,
        pairs=None if whole else max(8, form.size // 4 // 8 * 8),
    )
    call = run_attention if room is None else run_in_place
    results, expected = (call(session(form, native=native), feeds) for native in (True, False))
    for result, of_body in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, of_body, rtol=0, atol=CLOSE)
    np.testing.assert_allclose(results[0], reference(feeds, form), rtol=0, atol=CLOSE)


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    form=forms((32, 64, 80, 128)),
    tokens=st.sampled_from([100, 128, 256, 300, 513]),
    past=st.sampled_from([0, 0, 3, 256, 300]),
    seed=st.integers(0, 2**16),
)
def test_prompts_on_the_cpu(form: AttentionForm, tokens: int, past: int, seed: int) -> None:
    feeds = random_attention(np.random.default_rng(seed), form, tokens=tokens, past=past)
    for result, of_body in zip(
        *(run_attention(session(form, native=native), feeds) for native in (True, False)), strict=True
    ):
        np.testing.assert_allclose(result, of_body, rtol=0, atol=CLOSE)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(form=forms((2, 6, 10, 24, 40, 72)), **lengths)
def test_heads_of_any_size_on_the_cpu(form: AttentionForm, tokens: int, past: int, room: int | None, seed: int) -> None:
    """Also sizes that ONNX Runtime's kernel refuses."""
    extra = None if room is None else past + tokens + room
    feeds = random_attention(np.random.default_rng(seed), form, tokens=tokens, past=past, room=extra)
    attended = (run_attention if room is None else run_in_place)(session(form), feeds)[0]
    np.testing.assert_allclose(attended, reference(feeds, form), rtol=0, atol=CLOSE)


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("form", [PLAIN, ALL_AT_ONCE], ids=["plain", "all-at-once"])
def test_steps_are_one_call_on_the_cpu(form: AttentionForm, native: bool) -> None:
    """A prompt and steps after it, in one buffer, give the result of a call with all tokens."""
    rng = np.random.default_rng(0)
    call, tokens = session(form, native=native), 300
    feeds = random_attention(rng, form, tokens=tokens, past=0)
    whole, *present = run_attention(call, feeds)
    cache = {f"past_{part}": np.zeros((1, form.kv_heads, tokens, form.size), np.float32) for part in ("key", "value")}
    start = 0
    for length in (200, 80, *[1] * 20):
        end = start + length
        piece = feeds | cache | {"last_index": np.array([end - 1], np.int32), "buffer": np.array(tokens, np.int32)}
        piece |= {name: feeds[name][:, start:end] for name in ("query", "key", "value") if name in feeds}
        attended, cache["past_key"], cache["past_value"] = run_in_place(call, piece)
        np.testing.assert_allclose(attended, whole[:, start:end], rtol=0, atol=CLOSE)
        start = end
    for result, expected in zip((cache["past_key"], cache["past_value"]), present, strict=True):
        np.testing.assert_allclose(result, expected, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("native", NATIVE)
def test_padding_behind_a_prompt_on_the_cpu(native: bool) -> None:
    """Padding does not change the tokens before it."""
    form = replace(PLAIN, window=9)
    feeds = random_attention(np.random.default_rng(1), form, tokens=30, past=0)
    whole = run_attention(session(form, native=native), feeds)[0]
    feeds["last_index"] = np.array([19], np.int32)
    padded = run_attention(session(form, native=native), feeds)[0]
    np.testing.assert_allclose(padded[:, :20], whole[:, :20], rtol=0, atol=CLOSE)


def test_padding_alone_gives_zeros_on_the_cpu() -> None:
    feeds = random_attention(np.random.default_rng(1), PLAIN, tokens=3, past=0)
    feeds["last_index"] = np.array([-1], np.int32)
    assert not run_attention(session(PLAIN), feeds)[0].any()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("form", [PLAIN, ALL_AT_ONCE], ids=["plain", "all-at-once"])
def test_a_token_alone_gives_the_same_bits_on_the_cpu(form: AttentionForm, threads: int) -> None:
    """For any number of threads, other tokens of the call, and room of the cache."""
    rng = np.random.default_rng(2)
    feeds = random_attention(rng, form, tokens=37, past=600)
    together, *present = run_attention(session(form), feeds)
    keys, values = (np.concatenate([part, np.full_like(part, np.nan)], axis=2) for part in present)
    call = attention_session(form, threads=threads)
    for t in (0, 1, 15, 16, 36):
        alone = feeds | {"past_key": keys, "past_value": values, "last_index": np.array([600 + t], np.int32)}
        alone |= {name: feeds[name][:, t : t + 1] for name in ("query", "key", "value") if name in feeds}
        np.testing.assert_array_equal(run_in_place(call, alone)[0][:, 0], together[:, t])


@pytest.mark.parametrize("form", [PLAIN, ALL_AT_ONCE], ids=["plain", "all-at-once"])
def test_equal_calls_give_equal_bits_on_the_cpu(form: AttentionForm) -> None:
    feeds = random_attention(np.random.default_rng(3), form, tokens=2, past=900)
    first = run_attention(session(form), feeds)
    for _ in range(20):
        for result, expected in zip(run_attention(session(form), feeds), first, strict=True):
            np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("spoiled", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["query", "key", "value", "past_key", "past_value"])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_what_is_not_finite_reaches_the_results_on_the_cpu(name: str, spoiled: float, softcap: float) -> None:
    """As in the body. Earlier tokens, and tokens whose window does not include it, are unchanged."""
    form = AttentionForm(heads=4, kv_heads=2, size=32, window=20, softcap=softcap, rotary=False)
    feeds = random_attention(np.random.default_rng(4), form, tokens=5, past=300)
    spoil: tuple[int, ...] = (0, 2, 37) if name in ("query", "key", "value") else (0, 1, 282, 5)
    feeds[name][spoil] = spoiled
    attended, *present = run_attention(session(form), feeds)
    of_body, *expected = run_attention(session(form, native=False), feeds)
    for result, presented in zip(present, expected, strict=True):
        np.testing.assert_array_equal(result, presented)
    whole = reference(feeds, form)
    seen = np.isfinite(whole)
    np.testing.assert_array_equal(np.isfinite(attended), seen)
    # The body multiplies values that a token does not attend to by zero, which keeps NaN, and makes numbers of scores
    # that are all NaN.
    assert name == "query" or not (np.isfinite(of_body) & ~seen).any()
    assert seen.any()
    np.testing.assert_allclose(attended[seen], whole[seen], rtol=0, atol=CLOSE)


def test_no_tokens_on_the_cpu() -> None:
    feeds = random_attention(np.random.default_rng(5), PLAIN, tokens=0, past=4)
    attended, key, value = run_attention(session(PLAIN), feeds)
    assert attended.shape == (1, 0, 64)
    np.testing.assert_array_equal(key, feeds["past_key"])
    np.testing.assert_array_equal(value, feeds["past_value"])


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("query", (1, 64), r"query: expected shape \[1, tokens, width\], got \[1, 64\]"),
        ("query", (2, 1, 64), r"query: expected shape \[1, tokens, width\], got \[2, 1, 64\]"),
        ("query", (1, 1, 66), r"query: 4 heads do not fit into shape \[1, 1, 66\]"),
        ("query", (1, 1, 3), r"query: 4 heads do not fit into shape \[1, 1, 3\]"),
        ("key", (1, 1, 64), r"key: expected shape \[1, 1, 32\], got \[1, 1, 64\]"),
        ("value", (1, 2, 32), r"value: expected shape \[1, 1, 32\], got \[1, 2, 32\]"),
        ("past_key", (1, 2, 16), r"past_key: expected shape \[1, 2, past, 16\], got \[1, 2, 16\]"),
        ("past_key", (1, 4, 8, 16), r"past_key: expected shape \[1, 2, past, 16\], got \[1, 4, 8, 16\]"),
        ("past_value", (1, 2, 9, 16), r"past_value: expected shape \[1, 2, past, 16\], got \[1, 2, 9, 16\]"),
        ("last_index", (2,), r"last_index: expected one number, got shape \[2\]"),
        ("buffer", (2,), r"buffer: expected one number, got shape \[2\]"),
        ("cos_cache", (12, 9), r"cos_cache: expected shape \[positions, at most 8\], got \[12, 9\]"),
        ("cos_cache", (12,), r"cos_cache: expected shape \[positions, at most 8\], got \[12\]"),
        ("sin_cache", (11, 8), r"sin_cache: expected shape \[12, 8\], got \[11, 8\]"),
    ],
)
def test_shapes_that_do_not_fit(name: str, shape: tuple[int, ...], message: str) -> None:
    feeds = random_attention(np.random.default_rng(6), PLAIN, tokens=1, past=8)
    feeds[name] = np.ones(shape, feeds[name].dtype)
    with pytest.raises(Exception, match=f"tda::Attention: {message}"):
        run_attention(session(PLAIN), feeds)


@pytest.mark.parametrize(
    ("last_index", "buffer", "total"), [(9, 9, 10), (-2, 9, -1), (8, 400, 9), (40, 8, 41), (2**31 - 1, 9, 2**31)]
)
def test_lengths_that_do_not_fit_on_the_cpu(last_index: int, buffer: int, total: int) -> None:
    feeds = random_attention(np.random.default_rng(7), PLAIN, tokens=1, past=8)
    feeds |= {"last_index": np.array([last_index], np.int32), "buffer": np.array(buffer, np.int32)}
    message = (
        "cos_cache: it has 12 positions, and the attention mask 400"
        if buffer == 400
        else f"last_index: {total} tokens in all, 1 of them new, do not go with a past of 8 and a mask of {buffer}"
    )
    with pytest.raises(Exception, match=f"tda::Attention: {message}"):
        run_attention(session(PLAIN), feeds)


def test_heads_that_cannot_share_on_the_cpu() -> None:
    with pytest.raises(Exception, match="num_heads: 4 heads cannot share 3 key-value heads evenly"):
        attention_session(replace(PLAIN, kv_heads=3))
