"""The native kernel and the function body of `tda::RowLinear` against the sum over rows of its definition."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ffn_model import TOLERANCES, run
from tests.row_model import price_for, random_rows, reference, row_session, worth

ON_GPU = [pytest.param("float16", marks=pytest.mark.gpu), pytest.param("bfloat16", marks=pytest.mark.gpu)]
WAYS = [
    pytest.param("float32", False, id="body-float32"),
    pytest.param("float32", True, id="cpu-float32"),
    pytest.param("float16", True, id="cuda-float16", marks=pytest.mark.gpu),
    pytest.param("bfloat16", True, id="cuda-bfloat16", marks=pytest.mark.gpu),
]
session = functools.cache(row_session)

sizes = st.one_of(st.integers(1, 70), st.sampled_from([96, 256, 264, 577, 1025, 2560, 4360]))


def assert_close(y: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    finite = expected[np.isfinite(expected)]
    scale = max(1.0, float(np.abs(finite).max())) if finite.size else 1.0
    np.testing.assert_allclose(y.astype(np.float64), expected, rtol=0, atol=TOLERANCES[dtype] * scale)


@pytest.mark.parametrize(("dtype", "native"), WAYS)
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    inputs=sizes,
    outputs=sizes,
    tokens=st.sampled_from([1, 1, 2, 3, 4, 5, 17, 64]),
    density=st.sampled_from([0.0, 0.05, 0.3, 0.7, 0.95, 1.0]),
    zeros=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    bias=st.booleans(),
    early=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_it_is_the_sum_over_the_rows_that_are_worth_it(
    dtype: str,
    native: bool,
    inputs: int,
    outputs: int,
    tokens: int,
    density: float,
    zeros: float,
    bias: bool,
    early: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    feeds = random_rows(rng, tokens=tokens, inputs=inputs, outputs=outputs, dtype=dtype, zeros=zeros)
    feeds["price"] = price_for(feeds, density)
    y = run(session(bias=bias, early=early, dtype=dtype, native=native), feeds)
    assert_close(y, reference(feeds, bias=bias), dtype)


@pytest.mark.parametrize(("dtype", "native"), WAYS)
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("price", [0.0, -0.0, -1.0, -np.inf, np.nan])
def test_prices_that_read_every_row(dtype: str, native: bool, early: bool, price: float) -> None:
    rng = np.random.default_rng(0)
    feeds = random_rows(rng, tokens=3, inputs=300, outputs=264, dtype=dtype)
    call = session(early=early, dtype=dtype, native=native)
    dense = run(call, feeds)
    assert_close(dense, reference(feeds, bias=False), dtype)
    np.testing.assert_array_equal(run(call, feeds | {"price": np.full(1, price, np.float32)}), dense)


@pytest.mark.parametrize(("dtype", "native"), WAYS)
@pytest.mark.parametrize("tokens", [1, 5, 9])
@pytest.mark.parametrize("price", [1e-30, 0.5, np.inf])
def test_row_prices_of_nothing_and_of_infinity(dtype: str, native: bool, tokens: int, price: float) -> None:
    """A row of price 0 is skipped at any price above 0. One of infinity is always read, even for x of 0."""
    rng = np.random.default_rng(1)
    feeds = random_rows(rng, tokens=tokens, inputs=300, outputs=65, dtype=dtype, zeros=0.2)
    free, dear = np.arange(300) % 3 == 1, np.arange(300) % 3 == 2
    feeds["row_price"][free], feeds["row_price"][dear] = 0, np.inf
    feeds["price"] = np.full(1, price, np.float32)
    kept = np.where(free, 0, np.where(dear | ~(worth(feeds) < price), feeds["x"].astype(np.float64)[0], 0))
    expected = reference(feeds, bias=True)
    assert_close(expected, (kept @ feeds["w"].astype(np.float64) + feeds["bias"].astype(np.float64))[None], dtype)
    assert_close(run(session(bias=True, dtype=dtype, native=native), feeds), expected, dtype)


@pytest.mark.parametrize(("dtype", "native"), WAYS)
@pytest.mark.parametrize("spoiled", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("price", [0.0, 0.5, np.inf])
def test_x_that_is_not_finite_reaches_the_result(dtype: str, native: bool, spoiled: float, price: float) -> None:
    """And no other token's result."""
    rng = np.random.default_rng(2)
    feeds = random_rows(rng, tokens=5, inputs=300, outputs=264, dtype=dtype)
    feeds["x"][0, 2, 150] = spoiled
    feeds["price"][:] = price
    expected = reference(feeds, bias=False)
    np.testing.assert_array_equal(np.isfinite(expected).any(axis=2), [[True, True, False, True, True]])
    y = run(session(dtype=dtype, native=native), feeds).astype(np.float64)
    np.testing.assert_array_equal(np.isfinite(y), np.isfinite(expected))
    assert_close(np.where(np.isfinite(y), y, 0), np.where(np.isfinite(expected), expected, 0), dtype)


@pytest.mark.parametrize("dtype", ["float32", *ON_GPU])
@pytest.mark.parametrize("tokens", [1, 5])
def test_as_many_columns_as_a_head(dtype: str, tokens: int) -> None:
    """More slices of columns than blocks that run at once on a GPU, and more tiles than chunks on the CPU."""
    rng = np.random.default_rng(7)
    feeds = random_rows(rng, tokens=tokens, inputs=300, outputs=403 * 256, dtype=dtype)
    call = session(early=True, dtype=dtype)
    for density in (1.0, 0.4):
        feeds["price"] = price_for(feeds, density)
        assert_close(run(call, feeds), reference(feeds, bias=False), dtype)


@pytest.mark.parametrize("dtype", ["float32", *ON_GPU])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("tokens", [1, 6, 9])
@pytest.mark.parametrize("outputs", [264, 65])
def test_rows_that_are_not_needed_are_not_used(dtype: str, early: bool, tokens: int, outputs: int) -> None:
    """Skipped rows and rows of zeros have no effect, not even as 0 * NaN."""
    rng = np.random.default_rng(3)
    feeds = random_rows(rng, tokens=tokens, inputs=1000, outputs=outputs, dtype=dtype)
    feeds["x"][..., rng.random(1000) < 0.4] = 0
    call = session(early=early, dtype=dtype)
    for density in (1.0, 0.5):
        feeds["price"] = price_for(feeds, density) if density < 1 else np.zeros(1, np.float32)
        expected = run(call, feeds)
        unneeded = ((worth(feeds) < feeds["price"]) | (feeds["x"].reshape(tokens, -1) == 0)).all(axis=0)
        assert 0.3 < unneeded.mean() < 0.9
        spoiled = feeds | {"w": feeds["w"].copy()}
        spoiled["w"][unneeded] = np.nan
        np.testing.assert_array_equal(run(call, spoiled), expected)


@pytest.mark.parametrize("dtype", ["float32", *ON_GPU])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("outputs", [1024, 577])
def test_equal_calls_give_equal_bits(dtype: str, tokens: int, outputs: int) -> None:
    rng = np.random.default_rng(4)
    feeds = random_rows(rng, tokens=tokens, inputs=3000, outputs=outputs, dtype=dtype)
    feeds["price"] = price_for(feeds, 0.4)
    call = session(dtype=dtype)
    first = run(call, feeds)
    for _ in range(20):
        np.testing.assert_array_equal(run(call, feeds), first)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_token_alone_gives_the_same_bits_on_the_cpu(threads: int) -> None:
    """For any number of threads, and any rows that the other tokens of the call read."""
    rng = np.random.default_rng(5)
    feeds = random_rows(rng, tokens=19, inputs=700, outputs=1037, dtype="float32")
    feeds["price"] = price_for(feeds, 0.4)
    together = run(session(bias=True), feeds)
    call = session(bias=True, threads=threads)
    for count in (2, 8, 16):
        np.testing.assert_array_equal(run(call, feeds | {"x": feeds["x"][:, :count]}), together[:, :count])
    for t in range(19):
        alone = run(call, feeds | {"x": feeds["x"][:, t : t + 1]})
        np.testing.assert_array_equal(alone[:, 0], together[:, t])


@pytest.mark.parametrize("tokens", [513, 1029])
def test_more_tokens_than_a_tile_on_the_cpu(tokens: int) -> None:
    rng = np.random.default_rng(8)
    feeds = random_rows(rng, tokens=tokens, inputs=70, outputs=90, dtype="float32")
    feeds["price"] = price_for(feeds, 0.5)
    together = run(session(bias=True), feeds)
    for t in (0, 511, 512, tokens - 1):
        alone = run(session(bias=True), feeds | {"x": feeds["x"][:, t : t + 1]})
        np.testing.assert_array_equal(alone[:, 0], together[:, t])


@pytest.mark.parametrize("dtype", ["float32", *ON_GPU])
@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 1, 3, 7), (1, 0, 7)])
def test_leading_axes(dtype: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(6)
    feeds = random_rows(rng, tokens=1, inputs=7, outputs=9, dtype=dtype)
    feeds["x"] = rng.standard_normal(shape).astype(feeds["x"].dtype)
    y = run(session(dtype=dtype), feeds)
    assert y.shape == (*shape[:-1], 9)
    assert_close(y, reference(feeds, bias=False), dtype)


@pytest.mark.parametrize("dtype", ["float32", *ON_GPU])
@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("w", (4,), r"w: expected shape \[inputs, outputs\], got \[4\]"),
        ("w", (0, 3), r"w: a product of no inputs, shape \[0, 3\]"),
        ("w", (5, 3), r"x: expected shape \[.., 5\], as w has 5 rows, got \[1, 1, 4\]"),
        ("x", (1, 1, 3), r"x: expected shape \[.., 4\], as w has 4 rows, got \[1, 1, 3\]"),
        ("x", (), r"x: expected shape \[.., 4\], as w has 4 rows, got \[\]"),
        ("row_price", (3,), r"row_price: expected shape \[4\], one price for each row of w, got \[3\]"),
        ("row_price", (4, 1), r"row_price: expected shape \[4\], one price for each row of w, got \[4, 1\]"),
        ("price", (2,), r"price: expected shape \[1\], got \[2\]"),
        ("price", (0,), r"price: expected shape \[1\], got \[0\]"),
        ("bias", (4,), r"bias: expected shape \[3\], got \[4\]"),
        ("bias", (1, 3), r"bias: expected shape \[3\], got \[1, 3\]"),
    ],
)
def test_shapes_that_do_not_fit(dtype: str, name: str, shape: tuple[int, ...], message: str) -> None:
    feeds = random_rows(np.random.default_rng(7), tokens=1, inputs=4, outputs=3, dtype=dtype)
    feeds[name] = np.ones(shape, feeds[name].dtype)
    with pytest.raises(Exception, match=f"tda::RowLinear: {message}"):
        run(session(bias=True, dtype=dtype), feeds)
