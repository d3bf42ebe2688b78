"""The native kernels of integer formats on the CPU against sums of decoded elements."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tda_export.weights.formats import INTEGER_FORMATS, IntegerFormat
from tests.code_model import code_session, feeds_of, random_codes, row_feeds, row_reference, tolerance
from tests.ffn_model import run
from tests.row_model import price_for, worth

session = functools.lru_cache(maxsize=256)(code_session)
formats = st.sampled_from(sorted(INTEGER_FORMATS.values(), key=lambda format: format.name))
sizes = st.one_of(st.integers(1, 200), st.sampled_from([255, 576, 577, 1025, 4096, 4129, 8300]))
tokens = st.sampled_from([1, 1, 1, 2, 3, 4, 5, 8, 9, 17, 64])
FORMATS = [pytest.param(format, id=format.name) for format in INTEGER_FORMATS.values()]
SOME = [pytest.param(INTEGER_FORMATS[name], id=name) for name in ("int4_g32", "int4_g128", "int8_g64")]


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    format=formats,
    inputs=sizes,
    outputs=sizes,
    count=tokens,
    density=st.sampled_from([0.0, 0.05, 0.3, 0.7, 0.95, 1.0]),
    zeros=st.sampled_from([0.0, 0.3, 1.0]),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_sums_over_the_rows_that_are_worth_it(
    format: IntegerFormat,
    inputs: int,
    outputs: int,
    count: int,
    density: float,
    zeros: float,
    bias: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    inputs = min(inputs, 2_000_000 // outputs)
    feeds, elements = row_feeds(rng, format, inputs, outputs, count)
    feeds["x"][rng.random(feeds["x"].shape) < zeros] = 0
    feeds["price"] = price_for(feeds, density)
    y = run(session(format, outputs, rows=True, bias=bias), feeds)
    # Rounding adds up in long sums: with 7,843 rows one number of 16,320 was 0.00050 off, where 0.00046 were allowed.
    np.testing.assert_allclose(y, row_reference(feeds, elements, bias=bias), rtol=1e-5, atol=2 * feeds["tolerance"])


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(format=formats, inputs=sizes, outputs=sizes, count=tokens, seed=st.integers(0, 2**16))
def test_products_with_rows(format: IntegerFormat, inputs: int, outputs: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    outputs = min(outputs, 2_000_000 // inputs)
    codes = random_codes(rng, format, outputs, inputs)
    x = rng.standard_normal((1, count, inputs)).astype(np.float32)
    y = run(session(format, inputs, rows=False), feeds_of(codes, x))
    expected = x.astype(np.float64) @ codes.decode().astype(np.float64).T
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=tolerance(x, codes))


@pytest.mark.parametrize("format", SOME)
@pytest.mark.parametrize("count", [1, 6, 9])
@pytest.mark.parametrize("price", [-0.0, -1.0, -np.inf, np.nan])
def test_prices_that_read_every_row(format: IntegerFormat, count: int, price: float) -> None:
    feeds, elements = row_feeds(np.random.default_rng(0), format, 300, 264, count)
    call = session(format, 264, rows=True)
    dense = run(call, feeds)
    np.testing.assert_allclose(dense, row_reference(feeds, elements, bias=False), atol=feeds["tolerance"])
    np.testing.assert_array_equal(run(call, feeds | {"price": np.full(1, price, np.float32)}), dense)


@pytest.mark.parametrize("format", SOME)
@pytest.mark.parametrize("count", [1, 6, 9])
def test_a_price_of_infinity_leaves_the_bias(format: IntegerFormat, count: int) -> None:
    feeds, _ = row_feeds(np.random.default_rng(0), format, 300, 265, count)
    y = run(session(format, 265, rows=True, bias=True), feeds | {"price": np.full(1, np.inf, np.float32)})
    np.testing.assert_array_equal(y, np.broadcast_to(feeds["bias"], (1, count, 265)))


@pytest.mark.parametrize("format", SOME)
@pytest.mark.parametrize("spoiled", [np.nan, np.inf])
@pytest.mark.parametrize("count", [3, 9])
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "dots"])
def test_x_that_is_not_finite_reaches_its_own_result_alone(
    format: IntegerFormat, spoiled: float, count: int, rows: bool
) -> None:
    feeds, _ = row_feeds(np.random.default_rng(1), format, 264, 264, count)
    feeds["price"][:] = 0.5
    call = session(format, 264, rows=rows)
    expected = run(call, feeds)
    feeds["x"][0, 2, 150] = spoiled
    y = run(call, feeds)
    np.testing.assert_array_equal(np.delete(y, 2, axis=1), np.delete(expected, 2, axis=1))
    assert np.isfinite(expected).all()
    assert not np.isfinite(y[0, 2]).any()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("inputs", "outputs"), [(1100, 31), (2600, 650)])
@pytest.mark.parametrize("row", [3, 700, 1090])
@pytest.mark.parametrize("value", [np.inf, 1e-38])
def test_a_token_that_leaves_integers_in_one_list_of_rows(
    format: IntegerFormat, inputs: int, outputs: int, row: int, value: float
) -> None:
    """Rows are listed 512 at a time. One list has a value that is not finite, or none but one that is too small."""
    feeds, _ = row_feeds(np.random.default_rng(8), format, inputs, outputs, 9)
    call = session(format, outputs, rows=True)
    expected = run(call, feeds)
    if np.isfinite(value):
        feeds["x"][0, 4, row // 512 * 512 : row // 512 * 512 + 512] = 0
    feeds["x"][0, 4, row] = value
    y = run(call, feeds)
    np.testing.assert_array_equal(np.delete(y, 4, axis=1), np.delete(expected, 4, axis=1))
    np.testing.assert_array_equal(y[:, 4], run(call, feeds | {"x": feeds["x"][:, 4:5]})[:, 0])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("factor", [1e-30, 0.0, 1e30])
@pytest.mark.parametrize("count", [2, 4, 8, 13])
def test_a_token_of_another_size_changes_no_other_token(format: IntegerFormat, factor: float, count: int) -> None:
    """Products that are too small for steps are added by floats."""
    feeds, elements = row_feeds(np.random.default_rng(7), format, 600, 650, count)
    call = session(format, 650, rows=True)
    expected = run(call, feeds)
    feeds["x"][0, 1] *= np.float32(factor)
    y = run(call, feeds)
    np.testing.assert_array_equal(np.delete(y, 1, axis=1), np.delete(expected, 1, axis=1))
    np.testing.assert_array_equal(y[:, 1], run(call, feeds | {"x": feeds["x"][:, 1:2]})[:, 0])
    scale = np.float64(factor) * feeds["tolerance"].max()
    np.testing.assert_allclose(y[:, 1], row_reference(feeds, elements, bias=False)[:, 1], rtol=1e-4, atol=scale)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("count", [1, 5, 9])
@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf])
def test_scales_that_are_not_finite(format: IntegerFormat, count: int, scale: float) -> None:
    """In rows that no token reads they only change rounding. In others they reach the columns of their group alone."""
    rng = np.random.default_rng(2)
    for outputs in (520, 33):
        feeds, _ = row_feeds(rng, format, 100, outputs, count)
        feeds["price"] = price_for(feeds, 0.5)
        call = session(format, outputs, rows=True)
        expected = run(call, feeds)
        unread = (worth(feeds) < feeds["price"]).all(axis=0)
        assert unread.any()
        assert not unread.all()
        spoiled = feeds | {"scales": feeds["scales"].copy()}
        spoiled["scales"][unread] = scale
        tolerance = np.broadcast_to(feeds["tolerance"], expected.shape)
        np.testing.assert_allclose(run(call, spoiled), expected, atol=tolerance.max())
        read = np.flatnonzero(~(worth(feeds) < feeds["price"])[0])[0]
        spoiled["scales"][read, 0] = scale
        y = run(call, spoiled)
        assert not np.isfinite(y[0, 0, : format.group]).any()
        np.testing.assert_allclose(y[..., format.group :], expected[..., format.group :], atol=tolerance.max())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_scales_of_an_output_reach_that_output_alone(format: IntegerFormat, scale: float) -> None:
    rng = np.random.default_rng(3)
    for inputs in (520, 33):
        codes = random_codes(rng, format, 40, inputs)
        x = rng.standard_normal((1, 9, inputs)).astype(np.float32)
        call = session(format, inputs, rows=False)
        expected = run(call, feeds_of(codes, x))
        codes.scales[7, 0] = scale
        y = run(call, feeds_of(codes, x))
        assert not np.isfinite(y[..., 7]).any()
        np.testing.assert_array_equal(np.delete(y, 7, axis=2), np.delete(expected, 7, axis=2))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "dots"])
@pytest.mark.parametrize("count", [1, 8])
def test_every_scale_has_its_exact_value(format: IntegerFormat, rows: bool, count: int) -> None:
    """For all finite float16 numbers, also the smallest: products with a power of two are exact. Sums over rows lose
    terms that are small relative to the largest."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)].reshape(64, -1)
    groups = every.shape[1]
    columns = groups * format.group
    codes = random_codes(np.random.default_rng(4), format, 64, columns)
    codes = replace(codes, scales=every, codes=np.zeros_like(codes.codes), zero_points=np.zeros_like(codes.zero_points))
    codes.codes[:, :: format.group] = 1
    if rows:
        x = np.zeros((1, count, 64), np.float32)
        x[0, :, 9] = 0.5
        feeds = feeds_of(codes, x) | {"row_price": np.ones(64, np.float32), "price": np.zeros(1, np.float32)}
        y = run(session(format, columns, rows=True), feeds)
        expected = np.tile(every[9].astype(np.float32) / 2, (count, 1))
        np.testing.assert_allclose(y[0, :, :: format.group], expected, rtol=0, atol=2.0**15 / 2**21)
        return
    for group in (0, 5, groups - 1):
        x = np.zeros((1, count, columns), np.float32)
        x[..., group * format.group] = 0.5
        y = run(session(format, columns, rows=False), feeds_of(codes, x))
        np.testing.assert_array_equal(y[0], np.tile(every[:, group].astype(np.float32) / 2, (count, 1)))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "dots"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_token_alone_gives_the_same_bits(format: IntegerFormat, rows: bool, threads: int) -> None:
    """For any number of threads, and any rows that the other tokens of the call read, up to 16 tokens in all."""
    rng = np.random.default_rng(5)
    inputs, outputs = 700, 1037
    feeds, _ = row_feeds(rng, format, inputs, outputs, 16)
    feeds["price"] = price_for(feeds, 0.4)
    if not rows:
        feeds |= feeds_of(random_codes(rng, format, outputs, inputs), feeds["x"])
    columns = outputs if rows else inputs
    together = run(session(format, columns, rows=rows, bias=rows), feeds)
    call = session(format, columns, rows=rows, bias=rows, threads=threads)
    np.testing.assert_array_equal(run(call, feeds), together)
    for count in (2, 3, 7, 8, 15):
        np.testing.assert_array_equal(run(call, feeds | {"x": feeds["x"][:, :count]}), together[:, :count])
    for t in range(16):
        alone = run(call, feeds | {"x": feeds["x"][:, t : t + 1]})
        np.testing.assert_array_equal(alone[:, 0], together[:, t])


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "dots"])
@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 1, 3, 7), (1, 0, 7)])
def test_leading_axes(rows: bool, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(6)
    format = INTEGER_FORMATS["int4_g32"]
    feeds, elements = row_feeds(rng, format, 7, 7, 1)
    feeds["x"] = rng.standard_normal(shape).astype(np.float32)
    y = run(session(format, 7, rows=rows), feeds)
    assert y.shape == shape
    np.testing.assert_allclose(y, feeds["x"] @ (elements if rows else elements.T), atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "dots"])
@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("w", (40,), r"w: expected shape \[rows, {bytes}\], 40 codes of {bits} bits a row, got \[40\]"),
        ("w", (40, 41), r"w: expected shape \[rows, {bytes}\], 40 codes of {bits} bits a row, got \[40, 41\]"),
        ("scales", (40,), r"scales: expected shape \[40, 2\], those of 2 groups a row, got \[40\]"),
        ("scales", (40, 3), r"scales: expected shape \[40, 2\], those of 2 groups a row, got \[40, 3\]"),
        ("scales", (39, 2), r"scales: expected shape \[40, 2\], those of 2 groups a row, got \[39, 2\]"),
        (
            "zero_points",
            (40, 3),
            r"zero_points: expected shape \[40, {zeros}\], the bytes of 2 groups a row, got \[40, 3\]",
        ),
        (
            "zero_points",
            (1, 2),
            r"zero_points: expected shape \[40, {zeros}\], the bytes of 2 groups a row, got \[1, 2\]",
        ),
        ("x", (1, 39), r"x: expected shape \[.., 40\], as w has 40 {of}, got \[1, 39\]"),
        ("x", (), r"x: expected shape \[.., 40\], as w has 40 {of}, got \[\]"),
    ],
)
def test_shapes_that_do_not_fit(bits: int, rows: bool, name: str, shape: tuple[int, ...], message: str) -> None:
    format = INTEGER_FORMATS[f"int{bits}_g32"]
    feeds, _ = row_feeds(np.random.default_rng(7), format, 40, 40, 1)
    feeds[name] = np.ones(shape, feeds[name].dtype)
    expected = message.format(bytes=40 * bits // 8, bits=bits, zeros=2 * bits // 8, of="rows" if rows else "columns")
    with pytest.raises(Exception, match=f"tda::{'Row' if rows else ''}Linear{bits}: {expected}"):
        run(session(format, 40, rows=rows), feeds)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("row_price", (39,), r"row_price: expected shape \[40\], one price for each row of w, got \[39\]"),
        ("price", (2,), r"price: expected shape \[1\], got \[2\]"),
        ("bias", (39,), r"bias: expected shape \[40\], got \[39\]"),
    ],
)
def test_prices_and_biases_that_do_not_fit(name: str, shape: tuple[int, ...], message: str) -> None:
    format = INTEGER_FORMATS["int4_g32"]
    feeds, _ = row_feeds(np.random.default_rng(8), format, 40, 40, 1)
    feeds[name] = np.ones(shape, feeds[name].dtype)
    with pytest.raises(Exception, match=f"tda::RowLinear4: {message}"):
        run(session(format, 40, rows=True, bias=True), feeds)


def test_a_matrix_without_rows() -> None:
    format = INTEGER_FORMATS["int8_g32"]
    feeds, _ = row_feeds(np.random.default_rng(9), format, 1, 40, 1)
    empty = {name: feeds[name][:0] for name in ("w", "scales", "zero_points", "row_price")}
    with pytest.raises(Exception, match=r"tda::RowLinear8: w: a product of no inputs, shape \[0, 40\]"):
        run(session(format, 40, rows=True), feeds | empty | {"x": np.zeros((1, 1, 0), np.float32)})
    assert run(session(format, 40, rows=False), feeds | empty | {"x": np.zeros((1, 1, 40), np.float32)}).size == 0


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "dots"])
@pytest.mark.parametrize(
    ("columns", "group", "message"),
    [
        (0, 32, "columns: expected at least 1, got 0"),
        (-1, 32, "columns: expected at least 1, got -1"),
        (40, 16, "group: expected 32, 64 or 128, got 16"),
        (40, 0, "group: expected 32, 64 or 128, got 0"),
        (40, 256, "group: expected 32, 64 or 128, got 256"),
    ],
)
def test_attributes_that_do_not_fit(rows: bool, columns: int, group: int, message: str) -> None:
    with pytest.raises(Exception, match=f"Linear4: {message}"):
        code_session(INTEGER_FORMATS["int4_g32"], columns, rows=rows, group=group)


@pytest.mark.parametrize("format", SOME)
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "dots"])
@pytest.mark.parametrize("count", [513, 1029])
def test_more_tokens_than_a_tile(format: IntegerFormat, rows: bool, count: int) -> None:
    """Each token gives what it gives alone, also in the last tile."""
    rng = np.random.default_rng(10)
    feeds, _ = row_feeds(rng, format, 70, 90, count)
    feeds["price"] = price_for(feeds, 0.5)
    if not rows:
        feeds |= feeds_of(random_codes(rng, format, 90, 70), feeds["x"])
    call = session(format, 90 if rows else 70, rows=rows, bias=rows)
    together = run(call, feeds)
    for t in (0, 511, 512, count - 1):
        alone = run(call, feeds | {"x": feeds["x"][:, t : t + 1]})
        np.testing.assert_allclose(alone[:, 0], together[:, t], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("row", [0, 1, 32, 33])
def test_the_smallest_scales_of_rows(format: IntegerFormat, count: int, row: int) -> None:
    """Subnormal float16 numbers included: rows 0, 1, 32 and 33 of 64 have the smallest, of either sign."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = every[np.abs(every) < 2**-10].reshape(64, -1)
    codes = random_codes(np.random.default_rng(11), format, 64, every.shape[1] * format.group)
    codes = replace(codes, scales=every, codes=np.zeros_like(codes.codes), zero_points=np.zeros_like(codes.zero_points))
    codes.codes[:, :: format.group] = 1
    x = np.zeros((1, count, 64), np.float32)
    x[0, :, row] = 0.5
    feeds = feeds_of(codes, x) | {"row_price": np.ones(64, np.float32), "price": np.zeros(1, np.float32)}
    y = run(session(format, codes.codes.shape[1], rows=True), feeds)
    np.testing.assert_array_equal(y[0, :, :: format.group], np.tile(every[row].astype(np.float32) / 2, (count, 1)))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("columns", [np.s_[:1], np.s_[1:2], np.s_[2:]], ids=["first", "second", "others"])
def test_columns_of_small_scales_are_as_exact(format: IntegerFormat, count: int, columns: slice) -> None:
    """The integers that replace floats have their own unit in each group of columns."""
    rng = np.random.default_rng(12)
    feeds, _ = row_feeds(rng, format, 203, 5 * format.group, count)
    feeds["x"][..., 7] *= 1000
    call = session(format, 5 * format.group, rows=True)
    expected = run(call, feeds).reshape(count, 5, -1)[:, columns]
    others = np.delete(np.arange(5), columns)
    scales = feeds["scales"].copy()
    scales[:, others] *= 256
    y = run(call, feeds | {"scales": scales}).reshape(count, 5, -1)[:, columns]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
