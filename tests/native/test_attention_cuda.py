"""The native kernel of `tda::Attention` and `tda::Attention8` on CUDA against plain numpy, and their bodies."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.attention_model import AttentionForm, attention_session, forms, random_attention, reference
from tests.ffn_model import TOLERANCES, array_of, ort_value
from tests.stored_attention import check_codes

pytestmark = pytest.mark.gpu

session = functools.lru_cache(maxsize=32)(attention_session)
PLAIN = AttentionForm()
ALL_AT_ONCE = AttentionForm(heads=6, kv_heads=2, size=48, packed=True, window=150, scale=0.3, softcap=2.0)
WIDE = AttentionForm(heads=5, kv_heads=1, size=256)
CODES = [replace(form, kv="int8") for form in (PLAIN, ALL_AT_ONCE, WIDE)]
BOTH = pytest.mark.parametrize(
    "form",
    [PLAIN, ALL_AT_ONCE, WIDE, *CODES],
    ids=["plain", "all-at-once", "wide", "plain-codes", "all-at-once-codes", "wide-codes"],
)
DTYPES = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


def run_attention(call: ort.InferenceSession, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Run with a growing cache. Return the output, present keys and values, and their scales."""
    values = {name: ort_value(value) for name, value in feeds.items()}
    return [array_of(value) for value in call.run_with_ort_values([o.name for o in call.get_outputs()], values)]


def expected_of(feeds: Mapping[str, np.ndarray], form: AttentionForm, present: list[np.ndarray]) -> np.ndarray:
    """Return the expected results of a call, given the codes in the cache."""
    return reference(feeds, form, present if form.codes else None)


def run_in_place(call: ort.InferenceSession, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Run with the past's buffers as the present's, as the driver does, in float16."""
    run = InPlace(call, feeds)
    return [run(), *run.caches()]


class InPlace:
    """A call whose inputs stay on the device and may change from run to run."""

    def __init__(self, call: ort.InferenceSession, feeds: Mapping[str, np.ndarray]) -> None:
        self._call, self._binding = call, call.io_binding()
        self.values = {
            name: ort.OrtValue.ortvalue_from_numpy(value, "cpu" if name == "buffer" else "cuda", 0)
            for name, value in feeds.items()
        }
        for node in call.get_inputs():
            self._binding.bind_ortvalue_input(node.name, self.values[node.name])
        self._past = [output.name.replace("present", "past") for output in call.get_outputs()[1:]]
        _, kv_heads, _, size = feeds["past_key"].shape
        width = feeds["query"].shape[2] - (0 if "key" in feeds else 2 * kv_heads * size)
        shape = (1, feeds["query"].shape[1], width)
        self._attended = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float16, "cuda", 0)
        self._binding.bind_ortvalue_output("attended", self._attended)
        for past in self._past:
            self._binding.bind_ortvalue_output(past.replace("past", "present"), self.values[past])

    def __call__(self) -> np.ndarray:
        self._call.run_with_iobinding(self._binding)
        attended: np.ndarray = self._attended.numpy()
        return attended

    def caches(self) -> list[np.ndarray]:
        return [self.values[past].numpy() for past in self._past]


FORMS = {
    False: forms((8, 16, 40, 64, 80, 128, 256), kv_heads=(1, 2, 3, 8)),
    True: forms((16, 48, 64, 80, 128, 256), "int8", kv_heads=(1, 2, 3, 8)),
}


@pytest.mark.parametrize("codes", [False, True], ids=["floats", "codes"])
@DTYPES
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    data=st.data(),
    whole=st.booleans(),
    tokens=st.sampled_from([1, 1, 1, 2, 5, 16, 17, 40]),
    past=st.one_of(st.just(0), st.integers(1, 40), st.sampled_from([255, 256, 257, 700, 2100])),
    room=st.sampled_from([None, 0, 1, 300]),
    seed=st.integers(0, 2**16),
)
def test_it_is_what_the_formula_says(
    dtype: str,
    codes: bool,
    data: st.DataObject,
    whole: bool,
    tokens: int,
    past: int,
    room: int | None,
    seed: int,
) -> None:
    form = data.draw(FORMS[codes])
    feeds = random_attention(
        np.random.default_rng(seed),
        form,
        tokens=tokens,
        past=past,
        room=None if room is None else past + tokens + room,
        pairs=None if whole else max(1, form.size // 4),
        dtype=dtype,
    )
    results = run_attention(session(form, dtype=dtype), feeds)
    if codes:
        check_codes(feeds, form, results, tokens, past, close=TOLERANCES[dtype])
        assert not any(behind[:, :, past + tokens :].any() for behind in results[1:])
        return
    expected = reference(feeds, form)
    tolerance = TOLERANCES[dtype] * max(1.0, float(np.abs(expected).max(initial=0.0)))
    np.testing.assert_allclose(results[0].astype(np.float64), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("form", [PLAIN, ALL_AT_ONCE, WIDE], ids=["plain", "all-at-once", "wide"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_it_appends_as_the_body_does(form: AttentionForm, tokens: int) -> None:
    """In place, and to a growing cache. Memory behind the new tokens is unchanged, or zero."""
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


@pytest.mark.parametrize("form", CODES, ids=["plain", "all-at-once", "wide"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_it_appends_the_codes_of_the_body(form: AttentionForm, tokens: int) -> None:
    """Codes of values agree to the bit. Keys are rotated in float32, but by the body in float16. In place, no other
    memory is changed."""
    feeds = random_attention(np.random.default_rng(0), form, tokens=tokens, past=70, room=120, dtype="float16")
    native = run_in_place(session(form, dtype="float16"), feeds)
    check_codes(feeds, form, native, tokens, 70, close=TOLERANCES["float16"])
    body = run_attention(session(form, native=False, dtype="float16"), feeds)
    check_codes(feeds, form, body, tokens, 70, rounding=2**-10, close=TOLERANCES["float16"])
    for number in (2, 4):
        np.testing.assert_array_equal(native[number][:, :, : 70 + tokens], body[number][:, :, : 70 + tokens])
    for result, name in zip(native[1:], ("key", "value", "key_scale", "value_scale"), strict=True):
        np.testing.assert_array_equal(result[:, :, 70 + tokens :], feeds[f"past_{name}"][:, :, 70 + tokens :])


@BOTH
def test_a_token_alone_gives_the_same_bits(form: AttentionForm) -> None:
    """For any other tokens of the call, of which there are few, and any room of the cache."""
    rng = np.random.default_rng(2)
    feeds = random_attention(rng, form, tokens=16, past=600, dtype="float16")
    together, *present = run_attention(session(form, dtype="float16"), feeds)
    names = [name for name in feeds if name.startswith("past_")]
    behind = [
        np.concatenate([part, np.full_like(part, 99 if part.dtype == np.int8 else np.nan)], 2) for part in present
    ]
    for t in (0, 7, 15):
        alone = feeds | dict(zip(names, behind, strict=True)) | {"last_index": np.array([600 + t], np.int32)}
        alone |= {name: feeds[name][:, t : t + 1] for name in ("query", "key", "value") if name in feeds}
        for _ in range(3):
            attended, *held = run_in_place(session(form, dtype="float16"), alone)
            np.testing.assert_array_equal(attended[:, 0], together[:, t])
            for result, expected in zip(held, behind, strict=True):
                np.testing.assert_array_equal(result, expected)


# With clusters, on 132 multiprocessors, these are wide blocks in clusters of 16 to two, blocks of 128 threads in
# clusters of seven to two, and blocks of no cluster.
@pytest.mark.parametrize("kv_heads", [1, 8, 16, 32, 40, 70, 100, 160, 700])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("codes", [False, True], ids=["floats", "codes"])
def test_few_and_many_heads(kv_heads: int, group: int, codes: bool) -> None:
    """In place and not, one token and three give the same bits, and what the formula says."""
    form = AttentionForm(heads=group * kv_heads, kv_heads=kv_heads, size=64, kv="int8" if codes else "float")
    call = session(form, dtype="float16")
    for past in (0, 5, 40, 300):
        feeds = random_attention(np.random.default_rng(past), form, tokens=3, past=past, dtype="float16")
        together, *present = run_attention(call, feeds)
        expected = expected_of(feeds, form, present)
        tolerance = TOLERANCES["float16"] * max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(together.astype(np.float64), expected, rtol=0, atol=tolerance)
        names = [name for name in feeds if name.startswith("past_")]
        for t in range(3):
            alone = feeds | dict(zip(names, present, strict=True)) | {"last_index": np.array([past + t], np.int32)}
            alone |= {name: feeds[name][:, t : t + 1] for name in ("query", "key", "value")}
            attended, *held = run_in_place(call, alone)
            np.testing.assert_array_equal(attended[:, 0], together[:, t])
            for result, before in zip(held, present, strict=True):
                np.testing.assert_array_equal(result, before)


@pytest.mark.parametrize("codes", [False, True], ids=["floats", "codes"])
@pytest.mark.parametrize("window", [1, 17, 300, 1024])
@pytest.mark.parametrize(("kv_heads", "size"), [(1, 256), (2, 128), (32, 128)])
def test_windows_of_long_contexts(kv_heads: int, size: int, window: int, codes: bool) -> None:
    form = AttentionForm(
        heads=2 * kv_heads, kv_heads=kv_heads, size=size, window=window, kv="int8" if codes else "float"
    )
    for tokens, past in ((1, 0), (1, 1500), (16, 1501)):
        feeds = random_attention(np.random.default_rng(past), form, tokens=tokens, past=past, dtype="float16")
        attended, *present = run_attention(session(form, dtype="float16"), feeds)
        expected = expected_of(feeds, form, present)
        tolerance = TOLERANCES["float16"] * max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(attended.astype(np.float64), expected, rtol=0, atol=tolerance)


@BOTH
@pytest.mark.parametrize("tokens", [1, 4])
def test_one_captured_graph_serves_all_lengths(form: AttentionForm, tokens: int) -> None:
    """A call is captured once. Lengths, queries, keys and values then change in place, and it gives the result of a
    call without capture, to the bit."""
    rng, room = np.random.default_rng(3), 2100
    feeds = random_attention(rng, form, tokens=tokens, past=room - tokens, room=room, dtype="float16")
    replayed = InPlace(attention_session(form, dtype="float16", captured=room), feeds)
    for past in (0, 1, 63, 64, 65, 255, 256, 257, 1000, 1024, room - tokens):
        drawn = random_attention(rng, form, tokens=tokens, past=past, room=room, dtype="float16")
        changed = {name: drawn[name] for name in ("query", "key", "value", "last_index") if name in drawn}
        for name, array in changed.items():
            replayed.values[name].update_inplace(array)
        before = dict(zip((name for name in feeds if name.startswith("past_")), replayed.caches(), strict=True))
        found = [replayed(), *replayed.caches()]
        plain = run_in_place(session(form, dtype="float16"), feeds | before | changed)
        for result, expected in zip(found, plain, strict=True):
            np.testing.assert_array_equal(result, expected)


@BOTH
def test_padding_alone_gives_zeros(form: AttentionForm) -> None:
    feeds = random_attention(np.random.default_rng(1), form, tokens=3, past=0, dtype="float16")
    feeds["last_index"] = np.array([-1], np.int32)
    assert not run_attention(session(form, dtype="float16"), feeds)[0].any()


@pytest.mark.parametrize(
    ("codes", "name"),
    [
        *((codes, name) for name in ("query", "key", "value") for codes in (False, True)),
        (False, "past_key"),
        (False, "past_value"),
        (True, "past_key_scale"),
        (True, "past_value_scale"),
    ],
)
def test_what_is_not_finite_reaches_the_results(codes: bool, name: str) -> None:
    form = AttentionForm(heads=4, kv_heads=2, size=32, window=20, rotary=False, kv="int8" if codes else "float")
    feeds = random_attention(np.random.default_rng(4), form, tokens=5, past=300, dtype="float16")
    spoil: tuple[int, ...] = (0, 2, 37) if name in ("query", "key", "value") else (0, 1, 282, 5)
    feeds[name][spoil[:3] if codes else spoil] = np.nan
    attended, *present = run_attention(session(form, dtype="float16"), feeds)
    seen = np.isfinite(expected_of(feeds, form, present))
    np.testing.assert_array_equal(np.isfinite(attended), seen)
    assert 0 < seen.mean() < 1


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize(("last_index", "buffer"), [(9, 9), (-2, 9), (2**31 - 1, 9), (1000, 9), (-(2**31), 9)])
def test_lengths_that_do_not_fit_harm_nothing(last_index: int, buffer: int, codes: bool) -> None:
    """Lengths are on the device. With wrong ones the result is undefined, but no other memory is changed."""
    form = replace(PLAIN, kv="int8" if codes else "float")
    feeds = random_attention(np.random.default_rng(7), form, tokens=1, past=8, dtype="float16")
    feeds |= {"last_index": np.array([last_index], np.int32), "buffer": np.array(buffer, np.int32)}
    assert run_attention(session(form, dtype="float16"), feeds)[0].shape == (1, 1, 64)


@pytest.mark.parametrize(("codes", "multiple"), [(False, 8), (True, 16)])
@pytest.mark.parametrize("size", [12, 264])
def test_heads_that_it_does_not_read(size: int, codes: bool, multiple: int) -> None:
    form = replace(PLAIN, size=size, kv="int8" if codes else "float")
    feeds = random_attention(np.random.default_rng(8), form, tokens=1, past=8, dtype="float16")
    message = f"heads of {size} elements; on CUDA they have a multiple of {multiple}, at most 256"
    with pytest.raises(Exception, match=f"tda::Attention8?: query: {message}"):
        run_attention(session(form, dtype="float16"), feeds)
