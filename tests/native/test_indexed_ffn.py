"""The native kernel of `tda::IndexedFFN` against the sum over neurons of its definition."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tda_export.graph.ffn import FfnForm
from tests.ffn_model import TOLERANCES, ffn_session, forms, random_feeds, reference, run

LAYER = 1  # of the three entries of token_thresholds
ON_GPU = [pytest.param("float16", marks=pytest.mark.gpu), pytest.param("bfloat16", marks=pytest.mark.gpu)]
session = functools.cache(ffn_session)


@st.composite
def index_lists(draw: st.DrawFn, neurons: int) -> np.ndarray:
    """Draw some, none or all neurons, with padding anywhere."""
    share = draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    kept = np.flatnonzero(rng.random(neurons) < share)
    padding = draw(st.sampled_from([0, 1, 40]))
    indices = np.concatenate([kept, np.full(padding, -1)])
    return rng.permutation(indices) if draw(st.booleans()) else indices


@pytest.mark.parametrize("dtype", ["float32", *ON_GPU])
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    form=forms,
    down_bias=st.booleans(),
    hidden=st.one_of(st.integers(1, 70), st.sampled_from([8, 256, 264, 577, 1000, 1024, 2560, 4360])),
    neurons=st.integers(1, 90),
    tokens=st.sampled_from([1, 1, 2, 3, 4, 5, 17, 64]),
    threshold=st.sampled_from([0.0, 0.3, 1e9]),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_kernel_is_the_sum_over_its_indices(
    dtype: str,
    form: FfnForm,
    down_bias: bool,
    hidden: int,
    neurons: int,
    tokens: int,
    threshold: float,
    seed: int,
    data: st.DataObject,
) -> None:
    rng = np.random.default_rng(seed)
    indices = data.draw(index_lists(neurons))
    if dtype != "float32":  # on CUDA an index of no neuron is ignored
        indices = np.concatenate([indices, data.draw(st.sampled_from([[], [-7, neurons], [2**30, -(2**31)]]))])
    feeds = random_feeds(
        rng, tokens=tokens, hidden=hidden, neurons=neurons, indices=indices, dtype=dtype, threshold=threshold
    )
    expected, estimates = reference(form, feeds, down_bias=down_bias, threshold=threshold)
    # A neuron within rounding of the threshold may be read or not, so move the threshold away.
    if form.two_levels and threshold == 0.3:
        gap = TOLERANCES[dtype] * 10
        while len(close := estimates[np.abs(estimates - threshold) < gap]):
            threshold = float(close.max()) + 2 * gap
        feeds["token_thresholds"][LAYER] = threshold
        expected, _ = reference(form, feeds, down_bias=down_bias, threshold=threshold)
    y = run(session(form, down_bias=down_bias, layer=LAYER, dtype=dtype), feeds).astype(np.float64)
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(y, expected, rtol=0, atol=TOLERANCES[dtype] * scale)


@pytest.mark.parametrize("dtype", ["float32", *ON_GPU])
@pytest.mark.parametrize("tokens", [1, 3])
def test_equal_calls_give_equal_bits(dtype: str, tokens: int) -> None:
    rng = np.random.default_rng(0)
    feeds = random_feeds(
        rng, tokens=tokens, hidden=1024, neurons=3000, indices=np.arange(0, 3000, 2), dtype=dtype, threshold=0.2
    )
    call = session(FfnForm("silu", two_levels=True), layer=LAYER, dtype=dtype)
    first = run(call, feeds)
    for _ in range(20):
        np.testing.assert_array_equal(run(call, feeds), first)


@pytest.mark.parametrize("step", [1, 2], ids=["side by side", "apart"])
@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_a_token_alone_gives_the_same_bits_on_the_cpu(step: int, threshold: float) -> None:
    """For any neurons that the other tokens of the call read."""
    feeds = random_feeds(
        np.random.default_rng(0),
        tokens=17,
        hidden=250,
        neurons=900,
        indices=np.arange(0, 900, step),
        dtype="float32",
        threshold=threshold,
    )
    call = session(FfnForm("silu", two_levels=True), layer=LAYER)
    together = run(call, feeds)
    for first, count in ((0, 1), (3, 1), (0, 2), (2, 5), (0, 16), (16, 1)):
        x = feeds["x"][:, first : first + count]
        np.testing.assert_array_equal(run(call, feeds | {"x": x}), together[:, first : first + count])


@pytest.mark.parametrize("index", [4, 100, -2, -7, 2**31 - 1, -(2**31)])
def test_index_that_is_no_neuron_is_an_error_on_the_cpu(index: int) -> None:
    feeds = random_feeds(
        np.random.default_rng(0),
        tokens=1,
        hidden=2,
        neurons=4,
        indices=np.array([0, index]),
        dtype="float32",
        threshold=0,
    )
    with pytest.raises(Exception, match=rf"tda::IndexedFFN: mask_indices\[1\] is {index}, out of bounds: .* 0 to 3"):
        run(session(FfnForm("silu")), feeds)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("w_up", (4,), r"w_up: expected shape \[neurons, hidden size\], got \[4\]"),
        ("w_gate", (3, 2), r"w_gate: expected shape \[4, 2\], got \[3, 2\]"),
        ("w_down", (4, 3), r"w_down: expected shape \[4, 2\], got \[4, 3\]"),
        ("b_gate", (5,), r"b_gate: expected shape \[4\], got \[5\]"),
        ("b_up", (4, 1), r"b_up: expected shape \[4\], got \[4, 1\]"),
        ("b_down", (4,), r"b_down: expected shape \[2\], got \[4\]"),
        ("neuron_scale", (1,), r"neuron_scale: expected shape \[4\], got \[1\]"),
        ("token_thresholds", (1,), r"token_thresholds: layer 1 has no entry in shape \[1\]"),
        ("x", (), r"x: expected an axis of hidden size, got a scalar"),
        ("x", (1, 1, 0), r"x: the hidden size is 0"),
        ("x", (1,) * 9, r"a tensor of 9 axes; at most 8 are expected"),
    ],
)
def test_shapes_that_do_not_fit(name: str, shape: tuple[int, ...], message: str) -> None:
    feeds = random_feeds(
        np.random.default_rng(0), tokens=1, hidden=2, neurons=4, indices=np.arange(4), dtype="float32", threshold=0
    )
    call = session(FfnForm("silu", bias=True, two_levels=True), down_bias=True, layer=LAYER)
    with pytest.raises(Exception, match=f"tda::IndexedFFN: {message}"):
        run(call, feeds | {name: np.ones(shape, np.float32)})


@pytest.mark.parametrize("dtype", ["float32", *ON_GPU])
@pytest.mark.parametrize("order", ["side by side", "scattered"])
@pytest.mark.parametrize("gated", [False, True])
def test_zero_activations_cost_no_further_rows(gated: bool, order: str, dtype: str) -> None:
    """The further rows of ReLU's zeros have no effect, not even as 0 * NaN."""
    neurons, form = 400, FfnForm("relu", gated=gated, bias=True)
    rng = np.random.default_rng(0)
    indices = np.arange(neurons) if order == "side by side" else rng.permutation(neurons)
    feeds = random_feeds(rng, tokens=1, hidden=264, neurons=neurons, indices=indices, dtype=dtype, threshold=0.0)
    expected, _ = reference(form, feeds, down_bias=True, threshold=0.0)
    first = "gate" if gated else "up"
    products = feeds["x"].astype(np.float64)[0, 0] @ feeds[f"w_{first}"].astype(np.float64).T + feeds[f"b_{first}"]
    silent = products < -1e-2  # clearly negative in spite of rounding
    assert 100 < silent.sum() < 300
    for name in ("w_down", *(("w_up", "b_up") if gated else ())):
        feeds[name] = feeds[name].copy()
        feeds[name][silent] = np.nan
    y = run(session(form, down_bias=True, layer=LAYER, dtype=dtype), feeds).astype(np.float64)
    np.testing.assert_allclose(y, expected, rtol=0, atol=TOLERANCES[dtype] * max(1.0, float(np.abs(expected).max())))
    # The function body multiplies them, which proves that they would have an effect.
    body = run(session(form, down_bias=True, layer=LAYER, dtype=dtype, native=False), feeds)
    assert np.isnan(body.astype(np.float64)).all()
