"""Products that make their own input on the CPU, by the emulator of device code, and what tests compare them with."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import numpy as np
import pytest

from tda_export.weights.formats import integer_format
from tests.code_model import random_codes
from tests.ffn_model import NUMPY_DTYPES
from tests.native.cuda_on_cpu import Guarded, compile_for_cpu
from tests.native.test_row_linear_on_cpu import BY_MATRICES, Arguments, columns_of, grid_of

COMMON = (
    *(
        "activation.cuh",
        "cluster.cuh",
        "common.cuh",
        "format.cuh",
        "format_codes.cuh",
        "gated.cuh",
        "half_products.cuh",
    ),
    *("products.cuh", "rms_norm.cuh"),
)
ROWS = ("row_sums.cuh", "row_sums_matrices.cuh", "row_totals.cuh", "row_whole_slices.cuh", "row_linear.cu")
# By bits: kernels of one token by the columns of a thread, each with its warps.
KERNELS = {
    0: {"1_8_8_3": 8, "1_8_8_2": 8, "1_8_16_1": 16, "1_1_8_3": 8},
    4: {"1_32_8_2": 8, "1_16_8_2": 8, "1_8_16_1": 16, "1_1_8_3": 8},
    8: {"1_8_8_3": 8, "1_8_8_2": 8, "1_8_16_1": 16, "1_1_8_3": 8},
}
STORED, NORMED, GATED, RMS = range(4)
NORM_THREADS, THREADS = 512, 256
ACTIVATIONS = {0: 1, 4: 0, 8: 2}  # by bits, so that not every pair is compiled
CLUSTERS = {"float16": 1, "bfloat16": 0}  # by dtype, likewise


class FusedArguments(ctypes.Structure):
    _fields_ = (
        *Arguments._fields_,
        *((name, ctypes.c_void_p) for name in ("other", "norm_weight", "sum", "x_squares")),
        ("epsilon", ctypes.c_float),
        ("wide", ctypes.c_int),
    )


class NormArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "residual", "bias", "weight", "normed", "sum")),
        ("hidden", ctypes.c_int),
        ("epsilon", ctypes.c_float),
        ("early", ctypes.c_int),
    )


class GatedArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gate", "up", "h")),
        *((name, ctypes.c_int) for name in ("tokens", "neurons", "stride")),
    )


class RmsArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "squares", "weight", "normed")),
        *((name, ctypes.c_int) for name in ("tokens", "columns")),
        ("epsilon", ctypes.c_float),
    )


class AddArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("y", "residual", "squares")),
        *((name, ctypes.c_int) for name in ("tokens", "columns")),
    )


# Kernels of linear.cu by the name of their arguments, with their threads.
NORMS = {
    "AddNormArguments": {"AddNorm_8": NORM_THREADS, "AddNorm_1": NORM_THREADS},
    "RmsNormArguments": {"RmsNorm": THREADS},
    "AddSquaresArguments": {"AddSquares": THREADS},
}
Compile = Callable[..., ctypes.CDLL]


def compiler(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Return what compiles the kernels that a test asks for, once."""

    @functools.cache
    def compile_once(source: str, **defines: int) -> ctypes.CDLL:
        folder = tmp_path_factory.mktemp("device")
        defines = {"TDA_CLUSTERS": 0, "__CUDA_ARCH__": 900 if defines.get("TDA_CLUSTERS") else 800} | defines
        if source == "row_linear":
            named = KERNELS[defines["TDA_BITS"]] | (
                BY_MATRICES if defines["TDA_BITS"] and not defines["TDA_BF16"] else {}
            )
            kernels = {f"RowLinear_{name}": 32 * warps for name, warps in named.items()}
            return compile_for_cpu(folder, (*COMMON, *ROWS), kernels, "RowLinearArguments", defines)
        if source in NORMS:
            return compile_for_cpu(folder, (*COMMON, "row_totals.cuh", "linear.cu"), NORMS[source], source, defines)
        kernels = dict.fromkeys(("Gated_8", "Gated_1"), THREADS)
        return compile_for_cpu(folder, (*COMMON, "gated_activation.cu"), kernels, "GatedArguments", defines)

    return compile_once


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def bits_like(count: int) -> Guarded:
    return Guarded((count,), np.dtype(np.uint16))


class Product:
    """A matrix with prices, and kernels that multiply with it by so many blocks for a slice of columns."""

    def __init__(
        self,
        rng: np.random.Generator,
        compiled: Compile,
        *,
        dtype: str,
        bits: int,
        kernel: str,
        inputs: int,
        outputs: int,
        blocks: int,
        biased: bool,
        early: bool,
    ) -> None:
        self._compiled, self._bits, self._kernel, self._blocks = compiled, bits, kernel, blocks
        self._bf16, self._clusters = int(dtype == "bfloat16"), CLUSTERS[dtype]
        self._inputs, self._outputs, self._early = inputs, outputs, early
        self._group = 32
        if bits:
            self._tensors = random_codes(rng, integer_format(bits), inputs, outputs).pack()
            self._group = integer_format(bits).group
        else:
            elements = rng.standard_normal((inputs, outputs)) * inputs**-0.5
            self._tensors = (elements.astype(NUMPY_DTYPES[dtype]),)
        self._bias = rng.standard_normal(outputs).astype(NUMPY_DTYPES[dtype]) if biased else None
        self.row_price = np.exp(rng.standard_normal(inputs)).astype(np.float32)
        self.price = np.zeros(1, np.float32)

    def run(self, made: int, x: np.ndarray, **more: float) -> np.ndarray:
        """Return the bits of y, uint16 [out], of x as the kernel finds or makes it."""
        width = columns_of(self._kernel)
        slices = -(-self._outputs // (32 * width))
        y = bits_like(self._outputs)
        partial = Guarded((slices * self._blocks * 32 * width,), np.dtype(np.float32))
        arrived = np.zeros(slices, np.uint32)
        tensors = [np.ascontiguousarray(tensor) for tensor in self._tensors]
        places = dict(zip(("codes", "scales", "zero_points"), map(address, tensors), strict=False))
        arguments = FusedArguments(
            x=address(x),
            **places,
            columns=self._outputs,
            group_shift=self._group.bit_length() - 1,
            row_price=address(self.row_price),
            price=address(self.price),
            bias=None if self._bias is None else address(self._bias),
            partial=address(partial.array),
            arrived=address(arrived),
            y=address(y.array),
            tokens=1,
            inputs=self._inputs,
            outputs=self._outputs,
            counters=slices,
            early=self._early,
            **more,
        )
        defines = {"TDA_BF16": self._bf16, "TDA_BITS": self._bits, "TDA_INPUTS": made, "TDA_CLUSTERS": self._clusters}
        if made == GATED:
            defines["TDA_ACTIVATION"] = ACTIVATIONS[self._bits]
        library = self._compiled("row_linear", **defines)
        grid = grid_of(self._kernel, self._blocks, slices)
        cluster = grid[0] if self._clusters else 1
        library.Run(f"RowLinear_{self._kernel}".encode(), *grid, 1, cluster, ctypes.byref(arguments))
        for guarded in (y, partial):
            guarded.check()
        return y.array.copy()


def choose_price(rng: np.random.Generator, x: np.ndarray, product: Product, kind: str) -> None:
    """Set the price: a number, or one at which a part of the rows is dropped."""
    if kind != "some":
        product.price[:] = float(kind)
        return
    with np.errstate(all="ignore"):
        worth = x.astype(np.float32) ** 2 * product.row_price
    finite = worth[np.isfinite(worth)]
    product.price[:] = np.quantile(finite, rng.random()) if finite.size else 1.0


def spoil(rng: np.random.Generator, values: np.ndarray, kind: str) -> None:
    """Put zeros, or what is not finite, in some places."""
    if kind == "zeros":
        values[rng.random(values.shape) < 0.5] = 0
    elif kind == "negative zeros":
        values[rng.random(values.shape) < 0.5] = -0.0
    elif kind != "none":
        values[rng.integers(len(values))] = float(kind)
