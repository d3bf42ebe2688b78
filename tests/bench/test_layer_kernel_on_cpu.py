"""The kernel of benchmarks/layer_kernel.cuh, run on the CPU: all its blocks at once, one thread each."""

from __future__ import annotations

import ctypes
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.native.cuda_on_cpu import INSTRUCTIONS, Guarded, compile_for_cpu
from tests.native.test_row_linear_on_cpu import SOURCES

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="written for Linux on x86-64"
)
FOLDER = Path(__file__).parents[2] / "benchmarks"
# What a grid's barrier is made of. A thread that waits for other blocks lets those of its own block run.
BARRIER = {
    "ld.acquire.gpu": "value = __atomic_load_n(place, __ATOMIC_ACQUIRE); emulator::GiveWay(true);",
    "red.release.gpu": "__atomic_fetch_add(place, value, __ATOMIC_RELEASE);",
    "atom.acq_rel.gpu": "before = __atomic_fetch_add(place, 1u, __ATOMIC_ACQ_REL);",
    "mov.u64": "now = 0;",
}
MOST_PRODUCTS, CHUNK, SLICE, GROUP = 48, 16, 256, 32
# Kernels by name, with their warps, matrices under way, and units of a warp.
KERNELS = {"Layer_2_1": (2, 3, 12), "Layer_4_1": (4, 5, 4)}
PRODUCTS = ((256, 768), (512, 512), (512, 256), (256, 512))  # inputs and outputs; 48, 64, 32 and 32 units


class Product(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zero_points")),
        *((name, ctypes.c_int) for name in ("columns", "group_shift")),
        *((name, ctypes.c_void_p) for name in ("row_price", "groups", "arrived")),
        *((name, ctypes.c_int) for name in ("inputs", "outputs", "most_groups", "gathered")),
    )


class Arguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "price", "partial", "gathered", "y", "passed", "stamps")),
        *((name, ctypes.c_int) for name in ("count", "partial_size", "gathered_size", "early")),
        ("products", Product * MOST_PRODUCTS),
    )


@dataclass(frozen=True)
class Matrix:
    """A matrix of int4 with the prices of its rows."""

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray
    row_price: np.ndarray

    def values(self) -> np.ndarray:
        spread = [np.repeat(each, GROUP, axis=1) for each in (self.zero_points, self.scales)]
        return (self.codes.astype(np.float64) - spread[0]) * spread[1]


def packed(numbers: np.ndarray) -> np.ndarray:
    """Two numbers of four bits in a byte."""
    return np.ascontiguousarray(numbers[:, ::2] | numbers[:, 1::2] << 4)


def made_up(random: np.random.Generator, inputs: int, outputs: int, density: float) -> Matrix:
    codes = random.integers(0, 16, (inputs, outputs), dtype=np.uint8)
    zero_points = random.integers(0, 16, (inputs, outputs // GROUP), dtype=np.uint8)
    scales = random.uniform(0.5, 1.5, zero_points.shape) / (6.5 * np.sqrt(max(density, 0.1) * inputs))
    row_price = np.where(random.random(inputs) < density, 1e30, 0.0).astype(np.float32)
    return Matrix(codes, scales.astype(np.float16), zero_points, row_price)


def reference(x: np.ndarray, matrices: list[Matrix], price: float) -> np.ndarray:
    for matrix in matrices:
        x = x[: len(matrix.row_price)].astype(np.float32)
        kept = np.where(x * x * matrix.row_price < price, 0, x)
        x = (kept.astype(np.float64) @ matrix.values()).astype(np.float16)
    return x


def groups_of(inputs: int, outputs: int, blocks: int) -> np.ndarray:
    """How many blocks share each slice."""
    chunks, slices = inputs // CHUNK, outputs // SLICE
    units = chunks * slices
    groups = np.zeros(slices, np.uint8)
    for block in range(blocks):
        first, end = units * block // blocks, units * (block + 1) // blocks
        assert 0 < end - first <= chunks
        groups[first // chunks : (end - 1) // chunks + 1] += 1
    return groups


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("device")
    made = folder / "kernels.cuh"
    lines = (f"TDA_LAYER_KERNEL({warps}, 1, {slots}, {units})\n" for warps, slots, units in KERNELS.values())
    made.write_text("".join(lines))
    defines = {"TDA_BF16": 0, "TDA_BITS": 4, "TDA_CLUSTERS": 1, "TDA_INPUTS": 0, "__CUDA_ARCH__": 900}
    threads = {name: 32 * warps for name, (warps, *_) in KERNELS.items()}
    with pytest.MonkeyPatch.context() as patch:
        for start, text in BARRIER.items():
            patch.setitem(INSTRUCTIONS, start, text)
        sources = (*SOURCES, *(str(FOLDER / f"layer_{part}.cuh") for part in ("shares", "kernel")), str(made))
        return compile_for_cpu(folder, sources, threads, "LayerArguments", defines | {"__grid_constant__": ""})


def run(
    library: ctypes.CDLL, kernel: str, x: np.ndarray, matrices: list[Matrix], price: float, *, blocks: int, early: int,
    gathered: bool,
) -> list[np.ndarray]:  # fmt: skip
    """Run the kernel twice, and return y of each run."""
    outputs = [matrix.codes.shape[1] for matrix in matrices]
    all_groups = [groups_of(*matrix.codes.shape, blocks) for matrix in matrices]
    partial_size = max(int(groups.max()) * count for groups, count in zip(all_groups, outputs, strict=True))
    partial, between = Guarded((2, partial_size), np.dtype(np.float32)), Guarded((2, max(outputs)), np.dtype(np.uint16))
    passed, prices = np.zeros(2, np.uint32), np.array([price], np.float32)
    arguments = Arguments(
        x=x.ctypes.data,
        price=prices.ctypes.data,
        partial=partial.array.ctypes.data,
        gathered=between.array.ctypes.data,
        passed=passed.ctypes.data,
        count=len(matrices),
        partial_size=partial_size,
        gathered_size=max(outputs),
        early=early,
    )
    kept = []
    for p, (matrix, groups) in enumerate(zip(matrices, all_groups, strict=True)):
        arrays = [packed(matrix.codes), matrix.scales, packed(matrix.zero_points), matrix.row_price, groups]
        arrays.append(np.zeros(len(groups), np.uint32))
        kept.append(arrays)
        codes, scales, zero_points, row_price, shared, arrived = (array.ctypes.data for array in arrays)
        inputs, columns = matrix.codes.shape
        arguments.products[p] = Product(
            codes, scales, zero_points, columns, 5, row_price, shared, arrived, inputs, columns, int(groups.max()),
            gathered or p == len(matrices) - 1,
        )  # fmt: skip
    results = []
    for _ in range(2):
        y = Guarded((outputs[-1],), np.dtype(np.uint16))
        arguments.y = y.array.ctypes.data
        library.Run(kernel.encode(), blocks, 1, 1, blocks, ctypes.byref(arguments))
        for guarded in (partial, between, y):
            guarded.check()
        assert not passed.any()
        assert not any(arrays[-1].any() for arrays in kept)
        results.append(y.array.view(np.float16))
    return results


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("blocks", "density", "gathered"), [(4, 1.0, False), (5, 0.6, True), (7, 0.3, False), (5, 0.03, True)]
)
def test_chain_is_the_references(
    library: ctypes.CDLL, kernel: str, blocks: int, density: float, gathered: bool
) -> None:
    random = np.random.default_rng(blocks)
    matrices = [made_up(random, *shape, density) for shape in PRODUCTS]
    x = random.standard_normal(PRODUCTS[0][0]).astype(np.float16)
    price = 1.0 if density < 1.0 else 0.0
    wanted = reference(x, matrices, price).astype(np.float64)
    for early in (0, 2, 5):
        first, second = run(library, kernel, x, matrices, price, blocks=blocks, early=early, gathered=gathered)
        np.testing.assert_array_equal(first.view(np.uint16), second.view(np.uint16))
        assert np.abs(first - wanted).max() <= 5e-3 * np.abs(wanted).max()
