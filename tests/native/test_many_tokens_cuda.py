"""Products of many tokens on CUDA, by integers that are expanded."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from tda_export.weights.formats import INTEGER_FORMATS, IntegerFormat
from tests.code_model import code_session, feeds_of, random_codes, row_feeds, row_reference
from tests.ffn_model import NUMPY_DTYPES, run
from tests.native.test_codes_cuda import assert_close
from tests.row_model import price_for

pytestmark = pytest.mark.gpu

FORMATS = [pytest.param(INTEGER_FORMATS[name], id=name) for name in ("int4_g32", "int4_g128", "int8_g32", "int8_g128")]
SHAPES = [(33, 8, 8), (40, 300, 264), (129, 577, 1033), (33, 4096, 1160), (40, 9, 2056)]  # tokens, inputs, outputs

session = functools.lru_cache(maxsize=32)(code_session)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("density", [None, 0.4, 1.0])
def test_rows(
    dtype: str,
    format: IntegerFormat,
    shape: tuple[int, int, int],
    bias: bool,
    density: float | None,
) -> None:
    """`density`: a price at which this share of the rows is read; None is a constant price of 0."""
    tokens, inputs, outputs = shape
    feeds, elements = row_feeds(np.random.default_rng(0), format, inputs, outputs, tokens, dtype)
    if density is not None:
        feeds["price"] = price_for(feeds, density)
    constant = 0.0 if density is None else None
    call = session(format, outputs, rows=True, bias=bias, dtype=dtype, price=constant)
    expected = row_reference(feeds, elements, bias=bias)
    assert_close(run(call, feeds), expected, dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dots(dtype: str, format: IntegerFormat, shape: tuple[int, int, int]) -> None:
    tokens, inputs, outputs = shape
    rng = np.random.default_rng(1)
    codes = random_codes(rng, format, outputs, inputs)
    feeds = feeds_of(codes, rng.standard_normal((1, tokens, inputs)).astype(NUMPY_DTYPES[dtype]))
    expected = feeds["x"].astype(np.float64) @ codes.decode().astype(np.float64).T
    assert_close(run(session(format, inputs, rows=False, dtype=dtype), feeds), expected, dtype)


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "dots"])
@pytest.mark.parametrize("outputs", [4104, 4099], ids=["wide", "narrow"])
@pytest.mark.parametrize("name", ["int4_g32", "int8_g128"])
def test_several_strips(rows: bool, outputs: int, name: str) -> None:
    """A matrix that is too large to be expanded as a whole."""
    format, inputs, tokens = INTEGER_FORMATS[name], 20000, 40
    rng = np.random.default_rng(2)
    stored = (inputs, outputs) if rows else (outputs, inputs)
    codes = random_codes(rng, format, *stored)
    feeds = feeds_of(codes, rng.standard_normal((1, tokens, inputs)).astype(np.float16))
    feeds["row_price"] = np.ones(inputs, np.float32)
    matrix = torch.from_numpy(codes.decode())
    x = torch.from_numpy(feeds["x"]).float()
    expected = (x @ (matrix if rows else matrix.T)).double().numpy()
    call = session(format, stored[1], rows=rows, dtype="float16", price=0.0 if rows else None)
    assert_close(run(call, feeds), expected, "float16")


@pytest.mark.parametrize("price", [-0.0, -1.0, -np.inf, np.nan, 0.5, np.inf])
def test_constant_prices(price: float) -> None:
    """A constant price is worth as much as one that is an input."""
    format = INTEGER_FORMATS["int4_g32"]
    feeds, _ = row_feeds(np.random.default_rng(3), format, 300, 264, 40, "float16")
    feeds["price"] = np.float32([price])
    y = run(session(format, 264, rows=True, bias=True, dtype="float16", price=price), feeds)
    np.testing.assert_array_equal(y, run(session(format, 264, rows=True, bias=True, dtype="float16"), feeds))
    y = run(session(format, 264, rows=True, dtype="float16", price=price), feeds)
    np.testing.assert_array_equal(y, run(session(format, 264, rows=True, dtype="float16"), feeds))
