"""NormRowLinear and GatedRowLinear: the bits of the two nodes that they replace."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ffn_model import NUMPY_DTYPES
from tests.fused_model import AHEAD, fused_feeds, fused_session, revealing_epsilon, run_all

session = functools.lru_cache(maxsize=32)(fused_session)

KINDS = list(AHEAD)
BITS = [0, 4, 8]
ACTIVATIONS = ["silu", "gelu", "gelu_tanh", "relu"]
# Rows that suit loads of 1, 8, 16 and 32 columns, and every kernel's number of slices.
OUTPUTS = st.one_of(st.integers(1, 200), st.sampled_from([577, 1025, 1160, 4096, 4128, 8192, 12288, 24576]))
# Of more than 2 * 512 * 8 inputs AddNorm reads some again; a number that is no multiple of 8 is read singly.
INPUTS = st.one_of(st.integers(1, 200), st.sampled_from([511, 577, 2056, 4096, 8192, 8200, 9217]))


def same_bits(kind: str, bits: int, feeds: dict[str, np.ndarray], dtype: str, **form: object) -> list[np.ndarray]:
    """Run both ways, compare, and return y and what else there is."""
    columns = len(feeds["bias"])
    ways = [session(kind, bits, columns, dtype=dtype, fused=fused, **form) for fused in (True, False)]
    found, expected = (run_all(way, feeds) for way in ways)
    for mine, other in zip(found, expected, strict=True):
        bits_of = np.dtype(f"uint{8 * mine.dtype.itemsize}")
        np.testing.assert_array_equal(mine.view(bits_of), other.view(bits_of))
    return list(found)


def set_price(rng: np.random.Generator, feeds: dict[str, np.ndarray], price: str) -> None:
    """A number, or a price at which some rows are dropped, since x is of order one."""
    feeds["price"][:] = 10 ** rng.uniform(-2, 1) if price == "some" else float(price)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bias", [False, True])
def test_the_body_without_a_kernel(kind: str, bits: int, bias: bool) -> None:
    """On the CPU a half-precision graph has no kernels, and the library is not registered."""
    feeds = fused_feeds(np.random.default_rng(0), kind, bits, tokens=3, inputs=64, outputs=96, dtype="float16")
    y, *_ = same_bits(kind, bits, feeds, "float16", bias=bias, native=False, provider="CPUExecutionProvider")
    assert np.isfinite(y).all()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    bits=st.sampled_from(BITS),
    inputs=INPUTS,
    outputs=st.one_of(st.integers(1, 200), st.sampled_from([577, 1160, 4128])),
    tokens=st.sampled_from([1, 1, 2, 5, 17, 40]),
    price=st.sampled_from(["0", "some", "some", "nan", "inf", "-1"]),
    spoiled=st.sampled_from([None, None, 0.0, np.nan, np.inf]),
    bias=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 2**16),
)
def test_the_bits_of_two_nodes_on_the_cpu(
    kind: str,
    bits: int,
    inputs: int,
    outputs: int,
    tokens: int,
    price: str,
    spoiled: float | None,
    bias: bool,
    activation: str,
    seed: int,
) -> None:
    """Rows of chunks are made one by one, and by several threads. A token's bits do not depend on the call's others."""
    rng = np.random.default_rng(seed)
    inputs = max(1, min(inputs, 2_000_000 // outputs))
    feeds = fused_feeds(rng, kind, bits, tokens=tokens, inputs=inputs, outputs=outputs, dtype="float32")
    set_price(rng, feeds, price)
    if spoiled is not None:
        for name in AHEAD[kind][:2]:
            feeds[name][rng.random(feeds[name].shape) < (0.4 if spoiled == 0 else 1 / inputs)] = spoiled
    form = {"bias": bias, "activation": activation}
    found = same_bits(kind, bits, feeds, "float32", **form)
    if tokens <= 5:
        ahead = [name for name in AHEAD[kind] if name != "norm_weight"]
        last = feeds | {name: feeds[name][:, -1:] for name in ahead}
        alone = run_all(session(kind, bits, outputs, dtype="float32", fused=True, **form), last)
        for mine, other in zip(alone, found, strict=True):
            np.testing.assert_array_equal(mine[0, 0].view(np.uint32), other[0, -1].view(np.uint32))


def test_the_norm_on_the_cpu_is_that_of_the_body() -> None:
    rng = np.random.default_rng(1)
    for inputs, tokens in ((576, 1), (70, 3), (2049, 20)):
        feeds = fused_feeds(rng, "norm", 4, tokens=tokens, inputs=inputs, outputs=96, dtype="float32")
        found, expected = (
            run_all(fused_session("norm", 4, 96, dtype="float32", fused=True, native=native), feeds)
            for native in (True, False)
        )
        for mine, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())


@pytest.mark.parametrize("tokens", [0, 1, 3, 20])
def test_the_sum_is_there_where_there_is_no_output_on_the_cpu(tokens: int) -> None:
    feeds = fused_feeds(np.random.default_rng(2), "norm", 0, tokens=tokens, inputs=40, outputs=0, dtype="float32")
    y, total = run_all(session("norm", 0, 0, dtype="float32", fused=True), feeds)
    assert y.shape == (1, tokens, 0)
    np.testing.assert_array_equal(total, feeds["x"] + feeds["residual"])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    bits=st.sampled_from(BITS),
    dtype=st.sampled_from(["float16", "bfloat16"]),
    inputs=INPUTS,
    outputs=OUTPUTS,
    tokens=st.sampled_from([1, 1, 1, 1, 2, 5, 17, 40]),
    price=st.sampled_from(["0", "some", "some", "nan", "inf", "-1"]),
    spoiled=st.sampled_from([None, None, 0.0, -0.0, np.nan, np.inf, -np.inf]),
    bias=st.booleans(),
    early=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 2**16),
)
def test_the_bits_of_two_nodes(
    kind: str,
    bits: int,
    dtype: str,
    inputs: int,
    outputs: int,
    tokens: int,
    price: str,
    spoiled: float | None,
    bias: bool,
    early: bool,
    activation: str,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    inputs = max(1, min(inputs, 8_000_000 // outputs))
    feeds = fused_feeds(rng, kind, bits, tokens=tokens, inputs=inputs, outputs=outputs, dtype=dtype)
    set_price(rng, feeds, price)
    if spoiled is not None:
        for name in AHEAD[kind][:2]:
            feeds[name][rng.random(feeds[name].shape) < (0.4 if spoiled == 0 else 1 / inputs)] = spoiled
    same_bits(kind, bits, feeds, dtype, bias=bias, early=early, activation=activation)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_equal_calls_give_equal_bits(kind: str, bits: int, dtype: str) -> None:
    rng = np.random.default_rng(1)
    feeds = fused_feeds(rng, kind, bits, tokens=1, inputs=4096, outputs=4096, dtype=dtype)
    for early, price in ((True, 0.0), (True, 0.3), (False, 0.3)):
        feeds["price"][:] = price
        first = same_bits(kind, bits, feeds, dtype, early=early)
        for _ in range(20):
            for mine, other in zip(same_bits(kind, bits, feeds, dtype, early=early), first, strict=True):
                np.testing.assert_array_equal(mine, other)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("inputs", [1031, 4096, 8200])
@pytest.mark.parametrize("outputs", [265, 1024, 12288])
def test_squares_are_added_in_the_order_of_the_norm(inputs: int, outputs: int, dtype: str, bits: int) -> None:
    feeds = fused_feeds(np.random.default_rng(2), "norm", bits, tokens=1, inputs=inputs, outputs=outputs, dtype=dtype)
    feeds["norm_weight"] = (feeds["norm_weight"].astype(np.float32) / 100).astype(NUMPY_DTYPES[dtype])
    epsilon = revealing_epsilon(feeds["x"], feeds["residual"])
    same_bits("norm", bits, feeds, dtype, early=True, epsilon=epsilon)


@pytest.mark.gpu
def test_the_sum_is_there_where_there_is_no_output() -> None:
    """Of a matrix of elements: one of codes has at least one column."""
    rng = np.random.default_rng(2)
    for tokens in (0, 1, 3):
        feeds = fused_feeds(rng, "norm", 0, tokens=tokens, inputs=40, outputs=0, dtype="float16")
        y, total = run_all(session("norm", 0, 0, dtype="float16", fused=True), feeds)
        assert y.shape == (1, tokens, 0)
        np.testing.assert_array_equal(total, feeds["x"] + feeds["residual"])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (2,), (2, 1, 3), (1, 0), (40,)])
def test_leading_axes(kind: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(3)
    feeds = fused_feeds(rng, kind, 4, tokens=1, inputs=40, outputs=40, dtype="float16")
    for name in AHEAD[kind][:2]:
        width = feeds[name].shape[-1]
        feeds[name] = rng.standard_normal((*shape, width)).astype(np.float16)
    y, *_ = run_all(session(kind, 4, 40, dtype="float16", fused=True), feeds)
    assert y.shape == (*shape, 40)


MESSAGES = [
    ("norm", "x", (1, 1, 39), r"x: expected shape \[.., 40\], as w has 40 rows, got \[1, 1, 39\]"),
    ("norm", "residual", (1, 2, 40), r"residual: expected shape \[1, 1, 40\], got \[1, 2, 40\]"),
    ("norm", "norm_weight", (39,), r"norm_weight: expected shape \[40\], as w has 40 rows, got \[39\]"),
    ("norm", "row_price", (39,), r"row_price: expected shape \[40\], one price for each row of w, got \[39\]"),
    ("norm", "price", (2,), r"price: expected shape \[1\], got \[2\]"),
    ("norm", "bias", (39,), r"bias: expected shape \[40\], got \[39\]"),
    ("gated", "gate", (), r"gate: expected shape \[.., neurons\], got \[\]"),
    ("gated", "up", (1, 2, 40), r"up: expected shape \[1, 1, 40\], got \[1, 2, 40\]"),
    ("packed", "gate", (1, 1, 79), r"gate: expected shape \[.., 2 \* neurons\], got \[1, 1, 79\]"),
    (
        "packed",
        "gate",
        (1, 1, 40),
        r"gate: expected shape \[.., 80\], as w has 40 rows and there is no up, got \[1, 1, 40\]",
    ),
    ("packed", "row_price", (39,), r"row_price: expected shape \[40\], one price for each row of w, got \[39\]"),
]


@pytest.mark.parametrize("dtype", [pytest.param("float16", marks=pytest.mark.gpu), "float32"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("kind", "name", "shape", "message"), MESSAGES)
def test_shapes_that_do_not_fit(
    kind: str, bits: int, name: str, shape: tuple[int, ...], message: str, dtype: str
) -> None:
    feeds = fused_feeds(np.random.default_rng(4), kind, bits, tokens=1, inputs=40, outputs=40, dtype=dtype)
    feeds[name] = np.ones(shape, feeds[name].dtype)
    operator = f"{'Norm' if kind == 'norm' else 'Gated'}RowLinear{bits or ''}"
    with pytest.raises(Exception, match=f"tda::{operator}: {message}"):
        run_all(session(kind, bits, 40, dtype=dtype, fused=True), feeds)


@pytest.mark.parametrize("dtype", [pytest.param("float16", marks=pytest.mark.gpu), "float32"])
@pytest.mark.parametrize("bits", BITS)
def test_two_inputs_of_a_gate_have_the_width_of_the_rows(bits: int, dtype: str) -> None:
    feeds = fused_feeds(np.random.default_rng(5), "gated", bits, tokens=1, inputs=40, outputs=40, dtype=dtype)
    feeds |= {name: np.ones((1, 1, 80), NUMPY_DTYPES[dtype]) for name in AHEAD["gated"]}
    with pytest.raises(Exception, match=r"gate: expected shape \[.., 40\], as w has 40 rows, got \[1, 1, 80\]"):
        run_all(session("gated", bits, 40, dtype=dtype, fused=True), feeds)
