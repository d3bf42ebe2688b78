"""The device code of attention, run on the CPU: indices, exchanges between lanes, and arithmetic, without a GPU."""

from __future__ import annotations

import ctypes
import platform
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.attention_model import AttentionForm, forms, random_attention, reference
from tests.ffn_model import TOLERANCES
from tests.native.cuda_on_cpu import compile_attention, has_clusters, run_on_cpu
from tests.stored_attention import check_codes

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="written for Linux on x86-64"
)
LARGEST_HALF = 65504.0
WAYS = {  # dtype, whether the cache has codes, and compute capability
    "floats": ("float16", False, 90),
    "bfloat16": ("bfloat16", False, 90),
    "codes": ("float16", True, 90),
    "floats-without-clusters": ("float16", False, 80),
    "floats-without-matrices": ("float16", False, 75),
    "codes-without-clusters": ("bfloat16", True, 80),
    "codes-without-matrices": ("float16", True, 75),
}


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ctypes.CDLL, str, bool]:
    dtype, codes, capability = WAYS[request.param]
    folder = tmp_path_factory.mktemp("device")
    return compile_attention(folder, bf16=dtype == "bfloat16", codes=codes, capability=capability), dtype, codes


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    data=st.data(),
    tokens=st.sampled_from([1, 1, 1, 2, 17]),
    past=st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 65, 300])),
    room=st.sampled_from([None, 0, 30]),
    splits=st.sampled_from([1, 3]),
    wide=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_it_is_what_the_formula_says(
    way: tuple[ctypes.CDLL, str, bool],
    data: st.DataObject,
    tokens: int,
    past: int,
    room: int | None,
    splits: int,
    wide: bool,
    seed: int,
) -> None:
    library, dtype, codes = way
    form = data.draw(forms((16, 48, 64, 80, 128, 256), "int8" if codes else "float", kv_heads=(1, 2)))
    extra = None if room is None else past + tokens + room
    feeds = random_attention(np.random.default_rng(seed), form, tokens=tokens, past=past, room=extra, dtype=dtype)
    wide = wide and has_clusters(library)
    results = run_on_cpu(library, form, feeds, splits=splits, in_place=room is not None, wide=wide)
    if codes:
        return check_codes(feeds, form, results, tokens, past, close=TOLERANCES[dtype])
    expected = reference(feeds, form)
    tolerance = TOLERANCES[dtype] * max(1.0, float(np.abs(expected).max(initial=0.0)))
    np.testing.assert_allclose(results[0].astype(np.float64), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("heads", "size"), [(2, 32), (6, 128)])
def test_a_token_alone_gives_the_same_bits(way: tuple[ctypes.CDLL, str, bool], heads: int, size: int) -> None:
    library, dtype, codes = way
    form = AttentionForm(heads=heads, kv_heads=2, size=size, kv="int8" if codes else "float")
    feeds = random_attention(np.random.default_rng(2), form, tokens=9, past=80, dtype=dtype)
    wide = has_clusters(library)
    together, *present = run_on_cpu(library, form, feeds, splits=3, wide=wide)
    names = [name for name in feeds if name.startswith("past_")]
    for t in (0, 8):
        alone = feeds | dict(zip(names, present, strict=True)) | {"last_index": np.array([80 + t], np.int32)}
        alone |= {name: feeds[name][:, t : t + 1] for name in ("query", "key", "value")}
        attended, *held = run_on_cpu(library, form, alone, splits=3, in_place=True, wide=wide)
        np.testing.assert_array_equal(attended[:, 0], together[:, t])
        for result, expected in zip(held, present, strict=True):
            np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("way", ["floats", "codes"], indirect=True)
@pytest.mark.parametrize(
    ("heads", "size", "window", "splits", "past"),
    [
        (4, 64, 0, 16, 300),  # each rank joins as many sums as every other
        (3, 128, 50, 13, 200),  # some join fewer, and some parts are empty
        (1, 16, 0, 16, 9),  # a context shorter than one part of each rank
        (1, 16, 0, 16, 0),
    ],
)
def test_ranks_of_a_cluster(
    way: tuple[ctypes.CDLL, str, bool], heads: int, size: int, window: int, splits: int, past: int
) -> None:
    """Their number changes nothing but the order of sums."""
    library, dtype, codes = way
    form = AttentionForm(heads=heads, kv_heads=1, size=size, window=window, kv="int8" if codes else "float")
    feeds = random_attention(np.random.default_rng(5), form, tokens=1, past=past, dtype=dtype)
    attended, *present = run_on_cpu(library, form, feeds, splits=splits)
    expected = reference(feeds, form, present if codes else None)
    tolerance = TOLERANCES[dtype] * max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(attended.astype(np.float64), expected, rtol=0, atol=tolerance)
    for alone, held in zip(run_on_cpu(library, form, feeds, splits=1)[1:], present, strict=True):
        np.testing.assert_array_equal(alone, held)


@pytest.mark.parametrize("way", ["floats-without-clusters", "codes-without-clusters"], indirect=True)
@pytest.mark.parametrize(("size", "splits", "past"), [(48, 31, 200), (80, 33, 300), (256, 64, 500), (64, 64, 5)])
def test_a_kernel_joins_many_parts(way: tuple[ctypes.CDLL, str, bool], size: int, splits: int, past: int) -> None:
    """More parts than a warp has lanes, heads that are no whole warps, and parts without rows."""
    library, dtype, codes = way
    form = AttentionForm(heads=4, kv_heads=2, size=size, kv="int8" if codes else "float")
    feeds = random_attention(np.random.default_rng(6), form, tokens=1, past=past, dtype=dtype)
    attended, *present = run_on_cpu(library, form, feeds, splits=splits)
    expected = reference(feeds, form, present if codes else None)
    tolerance = TOLERANCES[dtype] * max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(attended.astype(np.float64), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        *((name, np.nan) for name in ("query", "key", "value", "past_key_scale", "past_value_scale")),
        *((name, np.inf) for name in ("query", "value")),
    ],
)
def test_what_is_not_finite_reaches_the_results(way: tuple[ctypes.CDLL, str, bool], name: str, number: float) -> None:
    library, dtype, codes = way
    if not codes and name.endswith("_scale"):
        name = name.removesuffix("_scale")
    form = AttentionForm(heads=4, kv_heads=2, size=32, window=20, rotary=False, kv="int8" if codes else "float")
    feeds = random_attention(np.random.default_rng(4), form, tokens=5, past=90, dtype=dtype)
    feeds[name][(0, 2, 37) if name in ("query", "key", "value") else (0, 1, 72)] = number
    attended, *present = run_on_cpu(library, form, feeds, splits=2)
    with np.errstate(invalid="ignore"):
        seen = np.isfinite(reference(feeds, form, present if codes else None))
    np.testing.assert_array_equal(np.isfinite(attended.astype(np.float32)), seen)
    assert 0 < seen.mean() < 1


@pytest.mark.parametrize("way", ["floats", "codes", "codes-without-matrices"], indirect=True)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(query=st.sampled_from([1e-3, 1.0, 30.0]), value=st.sampled_from([1e-6, 1.0, 30.0]), seed=st.integers(0, 2**16))
def test_weights_of_any_size(way: tuple[ctypes.CDLL, str, bool], query: float, value: float, seed: int) -> None:
    """Split into two float16 they are as precise as in float32, for any scales of values."""
    library, dtype, codes = way
    form = AttentionForm(heads=4, kv_heads=1, size=64, kv="int8" if codes else "float")
    rng = np.random.default_rng(seed)
    feeds = random_attention(rng, form, tokens=1, past=200, dtype=dtype)
    for name, factor in (("query", query), ("value", value)):
        feeds[name] = (feeds[name].astype(np.float32) * factor).astype(feeds[name].dtype)
    spread = value * np.exp(rng.normal(0, 2, feeds["past_value"].shape[:3]))
    if codes:
        feeds["past_value_scale"] *= spread.astype(np.float32)
    else:
        spread_values = feeds["past_value"].astype(np.float32) * spread[..., None]
        feeds["past_value"] = spread_values.clip(-LARGEST_HALF, LARGEST_HALF).astype(dtype)
    attended, *present = run_on_cpu(library, form, feeds, splits=2)
    expected = reference(feeds, form, present if codes else None)
    error = np.abs(attended.astype(np.float64) - expected)
    assert (error <= 2**-11 * np.abs(expected) + 2**-24 + 2e-4 * np.abs(expected).max()).all()
