"""The device code of products that make their own input, run on the CPU: the bits of separate kernels."""

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

from tests.ffn_model import NUMPY_DTYPES
from tests.fused_model import EPSILON, revealing_epsilon
from tests.native.cuda_on_cpu import Guarded
from tests.native.fused_on_cpu import (
    ACTIVATIONS,
    CLUSTERS,
    GATED,
    KERNELS,
    NORMED,
    RMS,
    STORED,
    THREADS,
    AddArguments,
    Compile,
    GatedArguments,
    NormArguments,
    Product,
    RmsArguments,
    address,
    bits_like,
    choose_price,
    compiler,
    spoil,
)
from tests.native.test_row_linear_on_cpu import BY_MATRICES, load_of
from tests.sums_model import square_parts

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="written for Linux on x86-64"),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    return compiler(tmp_path_factory)


def assert_norm_within(
    rng: np.random.Generator,
    compiled: Compile,
    product: Product,
    x: np.ndarray,
    residual: np.ndarray,
    weight: np.ndarray,
    *,
    epsilon: float,
    wide: bool,
    price: str,
) -> None:
    """AddNorm and then the product give the bits of the product that makes its norm, by loads of the same width."""
    inputs = len(x)
    normed, sums, own_sums = (bits_like(inputs) for _ in range(3))
    arguments = NormArguments(
        x=address(x),
        residual=address(residual),
        bias=None,
        weight=address(weight),
        normed=address(normed.array),
        sum=address(sums.array),
        hidden=inputs,
        epsilon=epsilon,
        early=1,
    )
    library = compiled("AddNormArguments", TDA_BF16=int(x.dtype == ml_dtypes.bfloat16), TDA_BITS=0)
    library.Run(b"AddNorm_8" if wide else b"AddNorm_1", 1, 1, 1, 1, ctypes.byref(arguments))
    choose_price(rng, normed.array.view(x.dtype), product, price)
    expected = product.run(STORED, normed.array)
    y = product.run(
        NORMED,
        x,
        other=address(residual),
        norm_weight=address(weight),
        sum=address(own_sums.array),
        epsilon=epsilon,
        wide=wide,
    )
    for guarded in (normed, sums, own_sums):
        guarded.check()
    np.testing.assert_array_equal(own_sums.array, sums.array)
    np.testing.assert_array_equal(y, expected)


# Of more than 2 * 512 * 8 inputs AddNorm reads some again; one that is no multiple of 8 is read singly.
SIZES = st.one_of(st.integers(1, 70), st.sampled_from([511, 512, 520, 1031, 2056, 4096, 4104, 8192, 8200, 1537]))
SLOW = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}


@dataclass(frozen=True)
class Case:
    """What both kinds of fused products draw."""

    kernel: str
    bits: int
    dtype: str
    inputs: int
    loads: int
    blocks: int
    price: str
    spoiled: str
    biased: bool
    early: bool
    seed: int

    def product(self, compiled: Compile) -> tuple[np.random.Generator, Product]:
        """Return a product, and the numbers to draw its inputs from."""
        rng = np.random.default_rng(self.seed)
        load = load_of(self.kernel)
        outputs = (1 if self.kernel in BY_MATRICES else 9) * self.loads * load
        return rng, Product(
            rng,
            compiled,
            dtype=self.dtype,
            bits=self.bits,
            kernel=self.kernel,
            inputs=self.inputs,
            outputs=min(outputs, max(1, 2_000_000 // self.inputs // max(32, load)) * max(32, load)),
            blocks=self.blocks,
            biased=self.biased,
            early=self.early,
        )


DRAWN = [(bits, kernel) for bits, kernels in KERNELS.items() for kernel in (*kernels, *(BY_MATRICES if bits else ()))]
CASES = st.sampled_from(DRAWN).flatmap(
    lambda drawn: st.builds(
        Case,
        bits=st.just(drawn[0]),
        kernel=st.just(drawn[1]),
        dtype=st.just("float16") if drawn[1] in BY_MATRICES else st.sampled_from(list(CLUSTERS)),
        inputs=SIZES,
        loads=st.integers(1, 5),
        blocks=st.integers(1, 3),
        price=st.sampled_from(["0", "some", "some", "nan", "inf", "-1"]),
        spoiled=st.sampled_from(["none", "none", "zeros", "negative zeros", "nan", "inf", "-inf"]),
        biased=st.booleans(),
        early=st.booleans(),
        seed=st.integers(0, 2**16),
    )
)


@settings(max_examples=40, **SLOW)
@given(case=CASES, cancels=st.booleans(), wide=st.booleans())
def test_a_norm_within_the_product(compiled: Compile, case: Case, cancels: bool, wide: bool) -> None:
    rng, product = case.product(compiled)
    x, residual, weight = (rng.standard_normal((3, case.inputs)) * 2).astype(NUMPY_DTYPES[case.dtype])
    for values in (x, residual):
        spoil(rng, values, case.spoiled)
    epsilon = EPSILON
    if cancels:
        epsilon = revealing_epsilon(x, residual)
        weight = (weight / 100).astype(weight.dtype)
    wide = wide and case.inputs % 8 == 0  # pointers may forbid it
    assert_norm_within(rng, compiled, product, x, residual, weight, epsilon=epsilon, wide=wide, price=case.price)


@pytest.mark.parametrize("kernel", ["1_8_8_2", "1_8_16_1"])
@pytest.mark.parametrize("dtype", list(CLUSTERS))
@pytest.mark.parametrize(("inputs", "wide"), [(1031, False), (1537, False), (4096, True), (8200, True)])
def test_squares_are_added_in_the_order_of_the_norm(
    compiled: Compile, inputs: int, wide: bool, dtype: str, kernel: str
) -> None:
    rng = np.random.default_rng(inputs)
    for _ in range(5):
        x, residual, weight = (rng.standard_normal((3, inputs)) * 2).astype(NUMPY_DTYPES[dtype])
        weight = (weight / 100).astype(weight.dtype)
        product = Product(
            rng,
            compiled,
            dtype=dtype,
            bits=0,
            kernel=kernel,
            inputs=inputs,
            outputs=64,
            blocks=2,
            biased=False,
            early=True,
        )
        epsilon = revealing_epsilon(x, residual)
        assert_norm_within(rng, compiled, product, x, residual, weight, epsilon=epsilon, wide=wide, price="0")


@settings(max_examples=25, **SLOW)
@given(case=CASES)
def test_a_norm_of_a_sum_whose_squares_are_given(compiled: Compile, case: Case) -> None:
    rng, product = case.product(compiled)
    x, weight = (rng.standard_normal((2, case.inputs)) * 2).astype(NUMPY_DTYPES[case.dtype])
    spoil(rng, x, case.spoiled)
    with np.errstate(all="ignore"):
        squares = square_parts(x)
    normed = bits_like(case.inputs)
    arguments = RmsArguments(
        x=address(x),
        squares=address(squares),
        weight=address(weight),
        normed=address(normed.array),
        tokens=1,
        columns=case.inputs,
        epsilon=EPSILON,
    )
    library = compiled("RmsNormArguments", TDA_BF16=int(case.dtype == "bfloat16"), TDA_BITS=0)
    library.Run(b"RmsNorm", 1, 1, 1, 1, ctypes.byref(arguments))
    normed.check()
    found = normed.array.view(x.dtype).astype(np.float64)
    with np.errstate(all="ignore"):
        exact = x.astype(np.float64) / np.sqrt((x.astype(np.float64) ** 2).mean() + EPSILON) * weight
    if np.isfinite(exact).all():
        np.testing.assert_allclose(found, exact, rtol={"float16": 1e-3, "bfloat16": 8e-3}[case.dtype], atol=1e-7)
    choose_price(rng, normed.array.view(x.dtype), product, case.price)
    y = product.run(RMS, x, norm_weight=address(weight), x_squares=address(squares), epsilon=EPSILON)
    np.testing.assert_array_equal(y, product.run(STORED, normed.array))


@pytest.mark.parametrize("dtype", list(CLUSTERS))
@pytest.mark.parametrize("columns", [1, 31, 64, 300, 576])
def test_the_addition_to_many_tokens(compiled: Compile, columns: int, dtype: str) -> None:
    """It is that of a product, whose own addition test_row_linear_on_cpu.py shows."""
    rng = np.random.default_rng(columns)
    product, residual = (rng.standard_normal((2, 3, columns)) * 2).astype(NUMPY_DTYPES[dtype])
    y, squares = Guarded((3, columns), np.dtype(np.uint16)), Guarded((3, -(-columns // 32)), np.dtype(np.float32))
    y.array[:] = product.view(np.uint16)
    arguments = AddArguments(
        y=address(y.array), residual=address(residual), squares=address(squares.array), tokens=3, columns=columns
    )
    library = compiled("AddSquaresArguments", TDA_BF16=int(dtype == "bfloat16"), TDA_BITS=0)
    library.Run(b"AddSquares", 3, -(-columns // THREADS), 1, 1, ctypes.byref(arguments))
    for guarded in (y, squares):
        guarded.check()
    sums = (product.astype(np.float32) + residual.astype(np.float32)).astype(product.dtype)
    np.testing.assert_array_equal(y.array, sums.view(np.uint16))
    np.testing.assert_array_equal(squares.array, square_parts(sums))


@settings(max_examples=25, **SLOW)
@given(case=CASES, packed=st.booleans())
def test_a_gated_activation_within_the_product(compiled: Compile, case: Case, packed: bool) -> None:
    rng, product = case.product(compiled)
    inputs = case.inputs
    both = (rng.standard_normal(2 * inputs) * 2).astype(NUMPY_DTYPES[case.dtype])
    spoil(rng, both, case.spoiled)
    gate, up = both, both[inputs:] if packed else both[inputs:].copy()
    h = bits_like(inputs)
    arguments = GatedArguments(
        gate=address(gate),
        up=address(up),
        h=address(h.array),
        tokens=1,
        neurons=inputs,
        stride=2 * inputs if packed else inputs,
    )
    wide = inputs % 8 == 0
    bf16 = int(case.dtype == "bfloat16")
    library = compiled("gated_activation", TDA_BF16=bf16, TDA_ACTIVATION=ACTIVATIONS[case.bits])
    kernel = b"Gated_8" if wide else b"Gated_1"
    library.Run(kernel, -(-inputs // (THREADS * (8 if wide else 1))), 1, 1, 1, ctypes.byref(arguments))
    h.check()
    element = ml_dtypes.bfloat16 if bf16 else np.float16
    choose_price(rng, h.array.view(element), product, case.price)
    y = product.run(GATED, gate, other=address(up))
    np.testing.assert_array_equal(y, product.run(STORED, h.array))
    residual = rng.standard_normal(len(y)).astype(element)
    squares = Guarded((-(-len(y) // 32),), np.dtype(np.float32))
    added = product.run(GATED, gate, other=address(up), residual=address(residual), squares=address(squares.array))
    squares.check()
    with np.errstate(all="ignore"):
        sums = (y.view(element).astype(np.float32) + residual.astype(np.float32)).astype(element)
        np.testing.assert_array_equal(added.view(element).astype(np.float32), sums.astype(np.float32))
        np.testing.assert_array_equal(squares.array, square_parts(sums))
