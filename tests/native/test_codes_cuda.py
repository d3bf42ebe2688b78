"""The native kernels of integer formats on CUDA against sums of decoded elements."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tda_export.weights.formats import INTEGER_FORMATS, IntegerFormat
from tests.code_model import code_session, feeds_of, random_codes, row_feeds, row_reference
from tests.ffn_model import NUMPY_DTYPES, TOLERANCES, run
from tests.row_model import price_for, worth

pytestmark = pytest.mark.gpu

session = functools.lru_cache(maxsize=32)(code_session)
formats = st.sampled_from(sorted(INTEGER_FORMATS.values(), key=lambda format: format.name))
dtypes = st.sampled_from(["float16", "bfloat16"])
# Rows for loads of 1, 8, 16 and 32 columns, and for the number of slices of every kernel.
sizes = st.one_of(
    st.integers(1, 200),
    st.sampled_from([255, 576, 577, 1025, 1160, 2064, 4096, 4128, 4129, 8192, 8208, 9216, 12288, 20000, 24576]),
)
tokens = st.sampled_from([1, 1, 1, 2, 3, 4, 5, 17, 33, 70])
SOME = [pytest.param(INTEGER_FORMATS[name], id=name) for name in ("int4_g32", "int4_g128", "int8_g64")]


def assert_close(y: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    np.testing.assert_allclose(y.astype(np.float64), expected, rtol=0, atol=TOLERANCES[dtype] * scale)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    format=formats,
    dtype=dtypes,
    inputs=sizes,
    outputs=sizes,
    count=tokens,
    density=st.sampled_from([0.0, 0.05, 0.3, 0.7, 0.95, 1.0]),
    zeros=st.sampled_from([0.0, 0.3, 1.0]),
    bias=st.booleans(),
    early=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_sums_over_the_rows_that_are_worth_it(
    format: IntegerFormat,
    dtype: str,
    inputs: int,
    outputs: int,
    count: int,
    density: float,
    zeros: float,
    bias: bool,
    early: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    inputs = max(1, min(inputs, 4_000_000 // outputs))
    feeds, elements = row_feeds(rng, format, inputs, outputs, count, dtype)
    feeds["x"][rng.random(feeds["x"].shape) < zeros] = 0
    feeds["price"] = price_for(feeds, density)
    y = run(session(format, outputs, rows=True, bias=bias, dtype=dtype, early=early), feeds)
    assert_close(y, row_reference(feeds, elements, bias=bias), dtype)


@pytest.mark.parametrize("name", ["int4_g32", "int8_g32"])
@pytest.mark.parametrize("shape", [(31, 256), (500, 1280), (4096, 4096), (11008, 1024), (1000, 22016)], ids=str)
def test_whole_slices_of_columns(name: str, shape: tuple[int, int]) -> None:
    """In float16 these are multiplied by tensor cores, by small blocks and by large ones."""
    (inputs, outputs), format = shape, INTEGER_FORMATS[name]
    feeds, elements = row_feeds(np.random.default_rng(5), format, inputs, outputs, 1, "float16")
    feeds["x"][0, 0, ::7] = 0
    for density in (0.0, 0.3, 1.0):
        feeds["price"] = price_for(feeds, density)
        expected = row_reference(feeds, elements, bias=True)
        for early in (False, True):
            call = session(format, outputs, rows=True, bias=True, dtype="float16", early=early)
            y = run(call, feeds)
            assert_close(y, expected, "float16")
            np.testing.assert_array_equal(run(call, feeds), y)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    format=formats,
    dtype=dtypes,
    inputs=sizes,
    outputs=sizes,
    count=tokens,
    early=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_products_with_rows(
    format: IntegerFormat, dtype: str, inputs: int, outputs: int, count: int, early: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    outputs = max(1, min(outputs, 4_000_000 // inputs))
    codes = random_codes(rng, format, outputs, inputs)
    x = rng.standard_normal((1, count, inputs)).astype(NUMPY_DTYPES[dtype])
    y = run(session(format, inputs, rows=False, dtype=dtype, early=early), feeds_of(codes, x))
    assert_close(y, x.astype(np.float64) @ codes.decode().astype(np.float64).T, dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("format", SOME)
@pytest.mark.parametrize("count", [1, 6, 40])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("price", [-0.0, -1.0, -np.inf, np.nan])
def test_prices_that_read_every_row(format: IntegerFormat, count: int, price: float, early: bool, dtype: str) -> None:
    feeds, elements = row_feeds(np.random.default_rng(0), format, 300, 264, count, dtype)
    call = session(format, 264, rows=True, dtype=dtype, early=early)
    dense = run(call, feeds)
    assert_close(dense, row_reference(feeds, elements, bias=False), dtype)
    np.testing.assert_array_equal(run(call, feeds | {"price": np.full(1, price, np.float32)}), dense)


@pytest.mark.parametrize("format", SOME)
@pytest.mark.parametrize("count", [1, 6, 40])
def test_a_price_of_infinity_leaves_the_bias(format: IntegerFormat, count: int) -> None:
    feeds, _ = row_feeds(np.random.default_rng(0), format, 300, 265, count, "float16")
    y = run(session(format, 265, rows=True, bias=True, dtype="float16"), feeds | {"price": np.float32([np.inf])})
    np.testing.assert_array_equal(y, np.broadcast_to(feeds["bias"], (1, count, 265)))


@pytest.mark.parametrize("format", SOME)
@pytest.mark.parametrize("spoiled", [np.nan, np.inf])
@pytest.mark.parametrize("count", [3, 7, 40])
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "dots"])
def test_x_that_is_not_finite_reaches_its_own_result_alone(
    format: IntegerFormat, spoiled: float, count: int, rows: bool
) -> None:
    feeds, _ = row_feeds(np.random.default_rng(1), format, 264, 264, count, "float16")
    feeds["x"][0, 2, 150] = spoiled
    feeds["price"][:] = 0.5
    y = run(session(format, 264, rows=rows, dtype="float16"), feeds)
    np.testing.assert_array_equal(np.isfinite(y).all(axis=2), [np.arange(count) != 2])
    assert not np.isfinite(y[0, 2]).any()


@pytest.mark.parametrize("format", SOME)
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf])
def test_scales_that_are_not_finite(format: IntegerFormat, count: int, early: bool, scale: float) -> None:
    """In rows that no token reads, they have no effect. In other rows they reach the columns of their group alone."""
    rng = np.random.default_rng(2)
    for outputs in (1088, 33, 12288):
        feeds, _ = row_feeds(rng, format, 100, outputs, count, "float16")
        feeds["price"] = price_for(feeds, 0.5)
        call = session(format, outputs, rows=True, dtype="float16", early=early)
        expected = run(call, feeds)
        unread = (worth(feeds) < feeds["price"]).all(axis=0)
        assert 0 < unread.mean() < 1
        spoiled = feeds | {"scales": feeds["scales"].copy()}
        spoiled["scales"][unread] = scale
        np.testing.assert_array_equal(run(call, spoiled), expected)
        read = np.flatnonzero(~(worth(feeds) < feeds["price"])[0])[0]
        spoiled["scales"][read, 0] = scale
        y = run(call, spoiled)
        assert not np.isfinite(y[0, 0, : format.group]).any()
        np.testing.assert_array_equal(y[..., format.group :], expected[..., format.group :])


@pytest.mark.parametrize("format", SOME)
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "dots"])
@pytest.mark.parametrize("count", [1, 3, 40])
def test_equal_calls_give_equal_bits(format: IntegerFormat, rows: bool, count: int) -> None:
    rng = np.random.default_rng(4)
    feeds, _ = row_feeds(rng, format, 3000, 1024, count, "float16")
    feeds["price"] = price_for(feeds, 0.4)
    if not rows:
        feeds |= feeds_of(random_codes(rng, format, 1024, 3000), feeds["x"])
    call = session(format, 1024 if rows else 3000, rows=rows, dtype="float16")
    first = run(call, feeds)
    for _ in range(20):
        np.testing.assert_array_equal(run(call, feeds), first)


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "dots"])
@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 1, 3, 7), (1, 0, 7), (40, 7)])
def test_leading_axes(rows: bool, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(6)
    format = INTEGER_FORMATS["int4_g32"]
    feeds, elements = row_feeds(rng, format, 7, 7, 1, "float16")
    feeds["x"] = rng.standard_normal(shape).astype(np.float16)
    y = run(session(format, 7, rows=rows, dtype="float16"), feeds)
    assert y.shape == shape
    assert_close(y, feeds["x"].astype(np.float64) @ (elements if rows else elements.T), "float16")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "dots"])
@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("w", (40, 41), r"w: expected shape \[rows, {bytes}\], 40 codes of {bits} bits a row, got \[40, 41\]"),
        ("scales", (39, 2), r"scales: expected shape \[40, 2\], those of 2 groups a row, got \[39, 2\]"),
        ("x", (1, 39), r"x: expected shape \[.., 40\], as w has 40 {of}, got \[1, 39\]"),
    ],
)
def test_shapes_that_do_not_fit(bits: int, rows: bool, name: str, shape: tuple[int, ...], message: str) -> None:
    format = INTEGER_FORMATS[f"int{bits}_g32"]
    feeds, _ = row_feeds(np.random.default_rng(7), format, 40, 40, 1, "float16")
    feeds[name] = np.ones(shape, feeds[name].dtype)
    expected = message.format(bytes=40 * bits // 8, bits=bits, of="rows" if rows else "columns")
    with pytest.raises(Exception, match=f"tda::{'Row' if rows else ''}Linear{bits}: {expected}"):
        run(session(format, 40, rows=rows, dtype="float16"), feeds)
