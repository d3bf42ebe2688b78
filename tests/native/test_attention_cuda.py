"""The native kernel of `tda::Attention` on CUDA against plain numpy, and its body, GroupQueryAttention."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.attention_model import OUTPUTS, AttentionForm, attention_session, forms, random_attention, reference
from tests.ffn_model import TOLERANCES, array_of, ort_value

pytestmark = pytest.mark.gpu

session = functools.cache(attention_session)
PLAIN = AttentionForm()
ALL_AT_ONCE = AttentionForm(heads=6, kv_heads=2, size=48, packed=True, window=150, scale=0.3, softcap=2.0)
WIDE = AttentionForm(heads=5, kv_heads=1, size=256)


def run_attention(call: ort.InferenceSession, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """What attention gives, present keys and values, with a cache that grows."""
    values = {name: ort_value(value) for name, value in feeds.items()}
    return [array_of(value) for value in call.run_with_ort_values(list(OUTPUTS), values)]


def run_in_place(call: ort.InferenceSession, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The same with the past's buffers for the present's, as the driver does; of float16."""
    binding = call.io_binding()
    values = {
        name: ort.OrtValue.ortvalue_from_numpy(value, "cpu" if name == "buffer" else "cuda", 0)
        for name, value in feeds.items()
    }
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("attended", "cuda")
    for part in ("key", "value"):
        binding.bind_ortvalue_output(f"present_{part}", values[f"past_{part}"])
    call.run_with_iobinding(binding)
    return [binding.get_outputs()[0].numpy(), values["past_key"].numpy(), values["past_value"].numpy()]


FORMS = forms((8, 16, 40, 64, 80, 128, 256), kv_heads=(1, 2, 3, 8))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    form=FORMS,
    whole=st.booleans(),
    tokens=st.sampled_from([1, 1, 1, 2, 5, 16, 17, 40]),
    past=st.one_of(st.just(0), st.integers(1, 40), st.sampled_from([255, 256, 257, 700, 2100])),
    room=st.sampled_from([None, 0, 1, 300]),
    seed=st.integers(0, 2**16),
)
def test_it_is_what_the_formula_says(
    dtype: str, form: AttentionForm, whole: bool, tokens: int, past: int, room: int | None, seed: int
) -> None:
    feeds = random_attention(
        np.random.default_rng(seed),
        form,
        tokens=tokens,
        past=past,
        room=None if room is None else past + tokens + room,
        pairs=None if whole else max(1, form.size // 4),
        dtype=dtype,
    )
    attended = run_attention(session(form, dtype=dtype), feeds)[0]
    expected = reference(feeds, form)
    tolerance = TOLERANCES[dtype] * max(1.0, float(np.abs(expected).max(initial=0.0)))
    np.testing.assert_allclose(attended.astype(np.float64), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("form", [PLAIN, ALL_AT_ONCE, WIDE], ids=["plain", "all-at-once", "wide"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_it_appends_as_the_body_does(form: AttentionForm, tokens: int) -> None:
    """In place, and to a cache that grows; behind the new tokens nothing is touched, or zeros are."""
    feeds = random_attention(np.random.default_rng(0), form, tokens=tokens, past=70, room=120, dtype="float16")
    results = [run_in_place(session(form, native=native, dtype="float16"), feeds) for native in (True, False)]
    for result, expected in zip(*results, strict=True):
        np.testing.assert_allclose(result.astype(np.float32), expected.astype(np.float32), rtol=0, atol=8e-3)
    for result, past in zip(results[0][1:], (feeds["past_key"], feeds["past_value"]), strict=True):
        np.testing.assert_array_equal(result[:, :, :70], past[:, :, :70])
        np.testing.assert_array_equal(result[:, :, 70 + tokens :], past[:, :, 70 + tokens :])
    grown = random_attention(np.random.default_rng(1), form, tokens=tokens, past=70, dtype="float16")
    present = run_attention(session(form, dtype="float16"), grown)[1]
    np.testing.assert_array_equal(present[:, :, :70], grown["past_key"])


@pytest.mark.parametrize("form", [PLAIN, ALL_AT_ONCE, WIDE], ids=["plain", "all-at-once", "wide"])
def test_a_token_alone_gives_the_same_bits(form: AttentionForm) -> None:
    """Whatever the other tokens of the call, of which there are few, and the room of the cache."""
    rng = np.random.default_rng(2)
    feeds = random_attention(rng, form, tokens=16, past=600, dtype="float16")
    together, *present = run_attention(session(form, dtype="float16"), feeds)
    keys, values = (np.concatenate([part, np.full_like(part, np.nan)], axis=2) for part in present)
    for t in (0, 7, 15):
        alone = feeds | {"past_key": keys, "past_value": values, "last_index": np.array([600 + t], np.int32)}
        alone |= {name: feeds[name][:, t : t + 1] for name in ("query", "key", "value") if name in feeds}
        for _ in range(3):
            np.testing.assert_array_equal(run_in_place(session(form, dtype="float16"), alone)[0][:, 0], together[:, t])


def test_padding_alone_gives_zeros() -> None:
    feeds = random_attention(np.random.default_rng(1), PLAIN, tokens=3, past=0, dtype="float16")
    feeds["last_index"] = np.array([-1], np.int32)
    assert not run_attention(session(PLAIN, dtype="float16"), feeds)[0].any()


@pytest.mark.parametrize("name", ["query", "key", "value", "past_key", "past_value"])
def test_what_is_not_finite_reaches_the_results(name: str) -> None:
    form = AttentionForm(heads=4, kv_heads=2, size=32, window=20, rotary=False)
    feeds = random_attention(np.random.default_rng(4), form, tokens=5, past=300, dtype="float16")
    spoil: tuple[int, ...] = (0, 2, 37) if name in ("query", "key", "value") else (0, 1, 282, 5)
    feeds[name][spoil] = np.nan
    attended = run_attention(session(form, dtype="float16"), feeds)[0]
    seen = np.isfinite(reference(feeds, form))
    np.testing.assert_array_equal(np.isfinite(attended), seen)
    assert 0 < seen.mean() < 1


@pytest.mark.parametrize(("last_index", "buffer"), [(9, 9), (-2, 9), (2**31 - 1, 9), (1000, 9), (-(2**31), 9)])
def test_lengths_that_do_not_fit_harm_nothing(last_index: int, buffer: int) -> None:
    """They are on the device: what a call returns is then undefined, but it touches no other memory."""
    feeds = random_attention(np.random.default_rng(7), PLAIN, tokens=1, past=8, dtype="float16")
    feeds |= {"last_index": np.array([last_index], np.int32), "buffer": np.array(buffer, np.int32)}
    assert run_attention(session(PLAIN, dtype="float16"), feeds)[0].shape == (1, 1, 64)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (replace(PLAIN, size=12), "heads of 12 elements; on CUDA they have a multiple of 8, at most 256"),
        (replace(PLAIN, size=264), "heads of 264 elements; on CUDA they have a multiple of 8, at most 256"),
    ],
)
def test_heads_that_it_does_not_read(form: AttentionForm, message: str) -> None:
    feeds = random_attention(np.random.default_rng(8), form, tokens=1, past=8, dtype="float16")
    with pytest.raises(Exception, match=f"tda::Attention: query: {message}"):
        run_attention(session(form, dtype="float16"), feeds)
