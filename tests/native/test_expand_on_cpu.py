"""Device code that prepares products of many tokens, run on the CPU: codes are expanded, and inputs dropped."""

from __future__ import annotations

import ctypes
import platform
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tda_export.weights.formats import INTEGER_FORMATS, IntegerFormat
from tests.code_model import random_codes
from tests.ffn_model import NUMPY_DTYPES
from tests.native.cuda_on_cpu import Guarded, compile_for_cpu

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="written for Linux on x86-64"
)
SOURCES = ("common.cuh", "format.cuh", "format_codes.cuh", "half_products.cuh", "products.cuh", "expand.cu")
THREADS = 256
TOGETHER = 4  # rows of a thread of Expand_8

Libraries = dict[tuple[str, int], ctypes.CDLL]


class ExpandArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zero_points")),
        *((name, ctypes.c_int) for name in ("stored_columns", "group_shift")),
        ("elements", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("first_row", "first_column", "rows", "columns")),
    )


class KeepArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "row_price", "price", "kept", "bias", "y")),
        *((name, ctypes.c_int) for name in ("tokens", "inputs", "outputs")),
    )


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Libraries:
    """By dtype and bits; those of 0 bits have the kernels of inputs."""
    folder, found = tmp_path_factory.mktemp("device"), {}
    for dtype in ("float16", "bfloat16"):
        for bits in (0, 4, 8):
            names = ("Expand_1", "Expand_8") if bits else ("Keep_1", "Keep_8")
            defines = {
                "TDA_BF16": int(dtype == "bfloat16"),
                "TDA_BITS": bits,
                "TDA_CLUSTERS": 0,
                "__CUDA_ARCH__": 900,
            }
            arguments = "ExpandArguments" if bits else "KeepArguments"
            found[dtype, bits] = compile_for_cpu(folder, SOURCES, dict.fromkeys(names, THREADS), arguments, defines)
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    format=st.sampled_from(list(INTEGER_FORMATS.values())),
    dtype=st.sampled_from(["float16", "bfloat16"]),
    rows=st.integers(1, 13),
    loads=st.integers(1, 40),
    first_row=st.sampled_from([0, 0, 3]),
    first_loads=st.sampled_from([0, 0, 1, 16]),
    blocks=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_expanding(
    libraries: Libraries,
    format: IntegerFormat,
    dtype: str,
    rows: int,
    loads: int,
    first_row: int,
    first_loads: int,
    blocks: int,
    seed: int,
) -> None:
    """A part of a matrix, with scales of every size: elements are rounded once."""
    rng = np.random.default_rng(seed)
    columns, first_column = 8 * loads, 8 * first_loads
    stored = first_column + columns + 8 * int(rng.integers(3))
    codes = random_codes(rng, format, first_row + rows + 1, stored)
    codes.scales[...] = (codes.scales * 2.0 ** rng.integers(-22, 12, codes.scales.shape)).astype(np.float16)
    packed = [np.asarray(array, order="C") for array in codes.pack()]
    expected = codes.decode()[first_row : first_row + rows, first_column : first_column + columns]
    expected = expected.astype(NUMPY_DTYPES[dtype]).view(np.uint16)
    for kernel, width, together in (("Expand_1", 1, 1), ("Expand_8", 8, TOGETHER)):
        elements = Guarded((rows, columns), np.dtype(np.uint16))
        arguments = ExpandArguments(
            *(array.ctypes.data for array in packed),
            stored_columns=stored,
            group_shift=format.group.bit_length() - 1,
            elements=elements.array.ctypes.data,
            first_row=first_row,
            first_column=first_column,
            rows=rows,
            columns=columns,
        )
        grid = (-(-columns // (THREADS * width)), min(blocks, -(-rows // together)), 1)
        libraries[dtype, format.bits].Run(kernel.encode(), *grid, 1, ctypes.byref(arguments))
        elements.check()
        np.testing.assert_array_equal(elements.array, expected, err_msg=kernel)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    dtype=st.sampled_from(["float16", "bfloat16"]),
    tokens=st.integers(1, 7),
    inputs=st.sampled_from([1, 8, 9, 40, 2048, 2056]),
    outputs=st.sampled_from([1, 8, 16, 300, 2304]),
    price=st.sampled_from([0.0, -1.0, 0.3, 2.0, np.inf, np.nan]),
    bias=st.booleans(),
    blocks=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_keeping_inputs(
    libraries: Libraries,
    dtype: str,
    tokens: int,
    inputs: int,
    outputs: int,
    price: float,
    bias: bool,
    blocks: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, inputs)).astype(NUMPY_DTYPES[dtype])
    x[rng.random(x.shape) < 0.05] = np.inf
    row_price, prices = np.exp(rng.standard_normal(inputs)).astype(np.float32), np.float32([price])
    added = rng.standard_normal(outputs).astype(x.dtype)
    worth = x.astype(np.float32) ** 2 * row_price
    expected = np.where(worth < prices, np.zeros_like(x), x)
    for kernel, width in (("Keep_1", 1), ("Keep_8", 8)):
        if inputs % width or outputs % width:
            continue
        kept, y = Guarded(x.shape, np.dtype(np.uint16)), Guarded((tokens, outputs), np.dtype(np.uint16))
        arguments = KeepArguments(
            x=x.ctypes.data,
            row_price=row_price.ctypes.data,
            price=prices.ctypes.data,
            kept=kept.array.ctypes.data,
            bias=added.ctypes.data if bias else None,
            y=y.array.ctypes.data,
            tokens=tokens,
            inputs=inputs,
            outputs=outputs,
        )
        grid = (-(-inputs // (THREADS * width)), min(blocks, tokens), 1)
        libraries[dtype, 0].Run(kernel.encode(), *grid, 1, ctypes.byref(arguments))
        for guarded in (kept, y):
            guarded.check()
        np.testing.assert_array_equal(kept.array, expected.view(np.uint16), err_msg=kernel)
        filled = np.broadcast_to(added.view(np.uint16), y.array.shape) if bias else np.full(y.array.shape, 0xFFFF)
        np.testing.assert_array_equal(y.array, filled, err_msg=kernel)
