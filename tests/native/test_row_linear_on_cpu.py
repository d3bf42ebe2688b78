"""The device code of RowLinear4 and RowLinear8, run on the CPU: rows through registers and through the ring."""

from __future__ import annotations

import ctypes
import platform
import sys
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tda_export.weights.formats import INTEGER_FORMATS, IntegerFormat, integer_format
from tests.code_model import row_feeds, row_reference
from tests.native.cuda_on_cpu import Guarded, compile_for_cpu, has_clusters
from tests.native.test_codes_cuda import assert_close
from tests.row_model import price_for, worth
from tests.sums_model import square_parts

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="written for Linux on x86-64"
)
SOURCES = (
    *("cluster.cuh", "common.cuh", "format.cuh", "format_codes.cuh", "half_products.cuh", "products.cuh"),
    *("rms_norm.cuh", "row_sums.cuh", "row_sums_matrices.cuh", "row_totals.cuh", "row_whole_slices.cuh"),
    "row_linear.cu",
)
# By bits: kernels by tokens and the columns of a thread, with their warps. Those of four tokens are last.
WHOLE = "1_whole_16_1"  # by blocks that stay
BY_MATRICES = {"1_small_8_3": 8, "1_large_16_1": 16, WHOLE: 16}
KERNELS = {
    4: {"1_32_8_2": 8, "1_16_8_2": 8, "1_8_16_1": 16, "1_1_8_3": 8, "4_8_8_1": 8, "4_1_8_1": 8},
    8: {"1_8_8_3": 8, "1_8_16_1": 16, "1_1_8_3": 8, "4_8_8_1": 8, "4_1_8_1": 8},
}
WAYS = {  # whether elements are bfloat16, the compute capability, and whether there are clusters
    "float16": (0, 90, 1),
    "bfloat16": (1, 80, 0),
    "float16-without-ring": (0, 75, 0),
}


class Arguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "codes", "scales", "zero_points")),
        *((name, ctypes.c_int) for name in ("columns", "group_shift")),
        *((name, ctypes.c_void_p) for name in ("row_price", "price", "bias", "partial", "arrived", "y")),
        *((name, ctypes.c_int) for name in ("tokens", "inputs", "outputs", "counters", "early")),
        *((name, ctypes.c_void_p) for name in ("residual", "squares")),
    )


@dataclass(frozen=True)
class Way:
    """Kernels for a kind of elements and GPU, by bits of a code."""

    dtype: str
    libraries: dict[int, ctypes.CDLL]
    kernels: dict[int, dict[str, int]]


def columns_of(kernel: str) -> int:
    """The columns that a thread of a kernel sums."""
    return 8 if kernel in BY_MATRICES else int(kernel.split("_")[1])


def load_of(kernel: str) -> int:
    """The columns that a row must have a whole number of: those of a thread's load, or by matrices of a slice."""
    return 256 if kernel in BY_MATRICES else columns_of(kernel)


def grid_of(kernel: str, blocks: int, slices: int) -> tuple[int, int]:
    """The grid where so many blocks share a slice. Blocks that stay are at least two, and here have two slices each."""
    return (max(2, blocks), -(-slices // 2)) if kernel == WHOLE else (blocks, slices)


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Way:
    folder, (bf16, capability, clusters) = tmp_path_factory.mktemp("device"), WAYS[request.param]
    libraries, all_kernels = {}, {}
    for bits in KERNELS:
        kernels = all_kernels[bits] = KERNELS[bits] | (BY_MATRICES if capability >= 80 and not bf16 else {})
        named = {f"RowLinear_{name}": 32 * warps for name, warps in kernels.items()}
        defines = {
            "TDA_BF16": bf16,
            "TDA_BITS": bits,
            "TDA_CLUSTERS": clusters,
            "TDA_INPUTS": 0,
            "__CUDA_ARCH__": 10 * capability,
        }
        libraries[bits] = compile_for_cpu(folder, SOURCES, named, "RowLinearArguments", defines)
    return Way(request.param.partition("-")[0], libraries, all_kernels)


def multiply(
    library: ctypes.CDLL, kernel: str, format: IntegerFormat, feeds: dict[str, np.ndarray], blocks: int, early: bool
) -> np.ndarray:
    """Run a kernel with this many blocks for a slice of columns, and return y."""
    return multiply_and_add(library, kernel, format, feeds, blocks, early)[0]


def multiply_and_add(
    library: ctypes.CDLL, kernel: str, format: IntegerFormat, feeds: dict[str, np.ndarray], blocks: int, early: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Do the same with the residual of the feeds, if there is one, and return y and its square parts."""
    feeds = {name: np.asarray(array, order="C") for name, array in feeds.items()}
    x, outputs = feeds["x"], feeds["bias"].shape[0]
    tile, width = int(kernel.split("_")[0]), columns_of(kernel)
    tiles, slices = -(-x.shape[1] // tile), -(-outputs // (32 * width))
    y = Guarded((1, x.shape[1], outputs), np.dtype(np.uint16))
    partial = Guarded((tiles * slices * blocks * tile * 32 * width,), np.dtype(np.float32))
    squares = Guarded((1, x.shape[1], -(-outputs // 32)), np.dtype(np.float32))
    arrived = np.zeros(tiles * slices, np.uint32)
    arguments = Arguments(
        x=x.ctypes.data,
        codes=feeds["w"].ctypes.data,
        **{name: feeds[name].ctypes.data for name in ("scales", "zero_points", "row_price", "price", "bias")},
        columns=outputs,
        group_shift=format.group.bit_length() - 1,
        partial=partial.array.ctypes.data,
        arrived=arrived.ctypes.data,
        y=y.array.ctypes.data,
        tokens=x.shape[1],
        inputs=x.shape[2],
        outputs=outputs,
        counters=len(arrived),
        early=early,
        residual=feeds["residual"].ctypes.data if "residual" in feeds else None,
        squares=squares.array.ctypes.data if "residual" in feeds else None,
    )
    grid = grid_of(kernel, blocks, slices)
    cluster = grid[0] if has_clusters(library) else 1
    library.Run(f"RowLinear_{kernel}".encode(), *grid, tiles, cluster, ctypes.byref(arguments))
    for guarded in (y, partial, squares):
        guarded.check()
    return y.array.view(ml_dtypes.bfloat16 if x.dtype == ml_dtypes.bfloat16 else np.float16), squares.array.copy()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    data=st.data(),
    format=st.sampled_from(list(INTEGER_FORMATS.values())),
    inputs=st.sampled_from([1, 7, 8, 9, 40, 130, 300]),
    loads=st.integers(1, 5),
    blocks=st.integers(1, 3),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    zeros=st.sampled_from([0.0, 0.4, 1.0]),
    early=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_sums_over_the_rows_that_are_worth_it(
    way: Way,
    data: st.DataObject,
    format: IntegerFormat,
    inputs: int,
    loads: int,
    blocks: int,
    density: float,
    zeros: float,
    early: bool,
    seed: int,
) -> None:
    kernels = [name for name in way.kernels[format.bits] if format.group == 32 or name not in BY_MATRICES]
    kernel = data.draw(st.sampled_from(kernels))
    rng = np.random.default_rng(seed)
    tokens = 1 if kernel.startswith("1_") else data.draw(st.integers(2, 5))
    outputs = (1 if kernel in BY_MATRICES else 9) * loads * load_of(kernel)
    feeds, elements = row_feeds(rng, format, inputs, outputs, tokens, way.dtype)
    feeds["x"][rng.random(feeds["x"].shape) < zeros] = 0
    feeds["price"] = price_for(feeds, density)
    y = multiply(way.libraries[format.bits], kernel, format, feeds, blocks, early)
    assert_close(y, row_reference(feeds, elements, bias=True), way.dtype)


@pytest.mark.parametrize("blocks", [1, 3, 4, 15])
def test_a_residual_is_added_to_the_rounded_total(way: Way, blocks: int) -> None:
    """With the squares of the sums, where some columns of the last slice are missing. Clusters of other than a power of
    two leave the sums to some of their blocks."""
    for bits, kernels in way.kernels.items():
        for kernel in kernels:
            format, rng = integer_format(bits), np.random.default_rng(blocks)
            tokens = 1 if kernel.startswith("1_") else 5
            outputs = 512 if kernel in BY_MATRICES else 32 * columns_of(kernel) + 3 * load_of(kernel)
            feeds, _ = row_feeds(rng, format, 70, outputs, tokens, way.dtype)
            alone = multiply(way.libraries[bits], kernel, format, feeds, blocks, True)
            residual = rng.standard_normal(alone.shape).astype(alone.dtype)
            sums, squares = multiply_and_add(
                way.libraries[bits], kernel, format, feeds | {"residual": residual}, blocks, True
            )
            expected = (alone.astype(np.float32) + residual.astype(np.float32)).astype(alone.dtype)
            np.testing.assert_array_equal(sums.view(np.uint16), expected.view(np.uint16))
            np.testing.assert_array_equal(squares, square_parts(sums))


@pytest.mark.parametrize("size", [1e-3, 300.0])
def test_small_and_large_factors_are_as_exact_as_others(way: Way, size: float) -> None:
    """A scale of eight bits is about a thousandth, and x may be small. Other kernels of int4 multiply in float16."""
    for bits, kernels in way.kernels.items():
        format = integer_format(bits)
        for kernel in (kernel for kernel in kernels if bits == 8 or kernel in BY_MATRICES):
            tokens = 1 if kernel.startswith("1_") else 2
            feeds, elements = row_feeds(np.random.default_rng(6), format, 150, 512, tokens, way.dtype)
            feeds["x"] = (feeds["x"].astype(np.float32) * size).astype(feeds["x"].dtype)
            feeds["bias"][:] = 0
            feeds["price"][:] = 0
            small = (feeds["scales"] * 0.01).astype(np.float16)
            elements = elements * (small / feeds["scales"]).astype(np.float64).repeat(format.group, axis=1)
            y = multiply(way.libraries[bits], kernel, format, feeds | {"scales": small}, 1, True).astype(np.float64)
            expected = row_reference(feeds, elements, bias=False)
            error = np.sqrt(((y - expected) ** 2).mean() / (expected**2).mean())
            assert error < {"float16": 2e-3, "bfloat16": 6e-3}[way.dtype] + 6e-8 / np.abs(expected).max(), (
                kernel,
                bits,
            )


# Kernels that read rows before it is known which are needed, by bits.
EARLY = {4: {"1_32_8_2", "1_16_8_2", *BY_MATRICES}, 8: {*BY_MATRICES}}


def early_kernels(way: Way) -> list[tuple[int, str]]:
    return [(bits, kernel) for bits, kernels in way.kernels.items() for kernel in kernels if kernel in EARLY[bits]]


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("price", [0.0, 0.5])
def test_rows_that_are_not_needed_may_be_anything(way: Way, price: float, early: bool) -> None:
    """Their scales are NaN. Rows of x = 0 are among them, also those loaded before x is known."""
    for bits, kernel in early_kernels(way):
        format = integer_format(bits)
        feeds, elements = row_feeds(np.random.default_rng(3), format, 200, 1024, 1, way.dtype)
        feeds["x"][0, 0, ::3] = 0
        feeds["price"] = price_for(feeds, price) if price else np.zeros(1, np.float32)
        unread = (feeds["x"][0, 0] == 0) | (worth(feeds)[0] < feeds["price"])
        feeds["scales"] = np.where(unread[:, None], np.float16(np.nan), feeds["scales"])
        y = multiply(way.libraries[bits], kernel, format, feeds, 2, early)
        elements[unread] = 0
        assert_close(y, row_reference(feeds, elements, bias=True), way.dtype)


def test_what_is_not_finite_reaches_the_result(way: Way) -> None:
    for bits, kernel in early_kernels(way):
        format, library = integer_format(bits), way.libraries[bits]
        feeds, _ = row_feeds(np.random.default_rng(4), format, 90, 1024, 1, way.dtype)
        feeds["scales"][5, 3] = np.inf
        y = multiply(library, kernel, format, feeds, 1, True)
        assert np.isfinite(y).all(axis=(0, 1)).tolist() == [column // 32 != 3 for column in range(1024)]
        feeds["x"][0, 0, 70] = np.nan
        assert not np.isfinite(multiply(library, kernel, format, feeds, 1, False)).any()
