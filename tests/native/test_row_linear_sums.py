"""RowLinearAdd, GatedRowLinearAdd and RmsRowLinear on a GPU: the numbers of the nodes that they replace."""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tda_export.graph import operators
from tda_export.graph.fused import fuse
from tda_export.graph.gated_activation import gated_activation, gated_activation_functions
from tda_export.graph.integer_linear import integer_functions, integer_row_linear
from tda_export.graph.linear import linear_functions
from tda_export.graph.ops import DTYPES, IR_VERSION, MICROSOFT, OPSET, Ops
from tda_export.graph.row_linear import row_linear, row_linear_functions
from tda_export.graph.sums import add_residuals
from tda_export.weights.formats import integer_format
from tda_export.weights.matrix import Matrix
from tests.code_model import random_codes
from tests.ffn_model import NUMPY_DTYPES, PROVIDERS
from tests.fused_model import EPSILON, run_all
from tests.sessions import small_session
from tests.sums_model import square_parts

STORED = ("w", "scales", "zero_points")
ADDING = {"row": operators.ROW_LINEAR_ADD, "gated": operators.GATED_ROW_LINEAR_ADD}


def layer_session(
    kind: str,
    bits: int,
    inputs: int,
    hidden: int,
    outputs: int,
    *,
    dtype: str,
    sums: bool,
    shown: bool = False,
    native: bool = True,
    provider: str | None = None,
) -> ort.InferenceSession:
    """A product [inputs, hidden], of x or of a gated activation, and one [hidden, outputs] of the norm of its sum with
    a residual. Outputs: y, the sum, with `shown` the norm, and with `sums`, which lets the first product add the
    residual, the sum's square parts."""
    ops, values = Ops(), {}

    def value(name: str, shape: list[int] | None = None, kind: str = dtype) -> ir.Value:
        found = None if shape is None else ir.Shape(shape)
        values[name] = ir.Value(name=name, type=ir.TensorType(DTYPES[kind]), shape=found)
        return values[name]

    matrices = []

    def product(name: str, x: ir.Value, rows: int, columns: int) -> ir.Value:
        row_price, price = value(f"{name}.row_price", [rows], "float32"), value(f"{name}.price", [1], "float32")
        bias = value(f"{name}.bias", [columns])
        if not bits:
            return row_linear(ops, x, value(f"{name}.w", [rows, columns]), row_price, price, bias, early=True)
        matrix = Matrix(name, rows, columns, integer_format(bits), "input")
        matrices.append(matrix)
        kinds = ("uint8", "float16", "uint8")
        stored = [
            value(f"{name}.{part}", list(tensor.shape), kind)
            for part, tensor, kind in zip(STORED, matrix.format.tensors(name, rows, columns), kinds, strict=True)
        ]
        return integer_row_linear(ops, matrix, x, stored, row_price, price, bias, early=True)

    x, residual, weight = value("x"), value("residual"), value("norm_weight")
    if kind == "gated":
        x = gated_activation(ops, "silu", x)
    normed, total = ops.multi(
        operators.ADD_NORM,
        *(product("first", x, inputs, hidden), residual, weight),
        outputs=(True, True),
        domain=operators.FUNCTION_DOMAIN,
        epsilon=EPSILON,
        early=1,
    )
    found = [product("second", normed, hidden, outputs), total]
    if shown:
        found.append(ops.op("Identity", normed))
    for result, name in zip(found, ("y", "sum", "norm"), strict=False):
        result.name, result.type = name, ir.TensorType(DTYPES[dtype])
    functions = [*linear_functions(), *row_linear_functions(), *gated_activation_functions("silu")]
    functions += integer_functions(matrices)
    imports = {"": OPSET, MICROSOFT: 1, operators.FUNCTION_DOMAIN: 1}
    graph = ir.Graph(list(values.values()), found, nodes=ops.tape.nodes, opset_imports=imports, name="layer")
    model = ir.Model(graph, ir_version=IR_VERSION, functions=functions)
    fuse(model)
    if sums:
        add_residuals(model)
        form = str(bits or "")
        made = [operators.RMS_NORM, "Identity", operators.ROW_LINEAR] if shown else [operators.RMS_ROW_LINEAR]
        assert sorted(node.op_type for node in graph) == sorted([ADDING[kind] + form, *made[:-1], made[-1] + form])
        squares = graph[0].outputs[1]
        squares.name = "squares"
        graph.outputs.append(squares)
    return small_session(ir.to_proto(model).SerializeToString(), provider or PROVIDERS[dtype], native=native)


session = functools.lru_cache(maxsize=32)(layer_session)


def layer_feeds(
    rng: np.random.Generator, kind: str, bits: int, sizes: tuple[int, int, int], *, tokens: int, dtype: str
) -> dict[str, np.ndarray]:
    """Inputs at prices at which each token reads about half of the rows, far from any that rounding would decide."""
    inputs, hidden, outputs = sizes

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(NUMPY_DTYPES[dtype])

    feeds = {"x": draw(1, tokens, 2 * inputs if kind == "gated" else inputs), "residual": draw(1, tokens, hidden)}
    feeds["norm_weight"] = draw(hidden)
    for name, rows, columns in (("first", inputs, hidden), ("second", hidden, outputs)):
        if bits:
            packed = random_codes(rng, integer_format(bits), rows, columns).pack()
            feeds |= {f"{name}.{part}": each for part, each in zip(STORED, packed, strict=True)}
        else:
            feeds[f"{name}.w"] = draw(rows, columns) / NUMPY_DTYPES[dtype](rows**0.5)
        feeds[f"{name}.row_price"] = np.where(rng.random(rows) < 0.5, 0, 1e30).astype(np.float32)
        feeds[f"{name}.price"] = np.full(1, 1e-3, np.float32)
        feeds[f"{name}.bias"] = draw(columns)
    return feeds


Numbers = tuple[np.ndarray, np.ndarray, np.ndarray]


def both_ways(
    kind: str, bits: int, sizes: tuple[int, int, int], feeds: dict[str, np.ndarray], dtype: str, **form: object
) -> tuple[Numbers, tuple[np.ndarray, np.ndarray]]:
    """Run with and without sums, compare y, and return all results."""
    y, total, *_, squares = run_all(session(kind, bits, *sizes, dtype=dtype, sums=True, **form), feeds)
    expected, expected_total, *_ = run_all(session(kind, bits, *sizes, dtype=dtype, sums=False, **form), feeds)
    scale = np.sqrt((expected.astype(np.float64) ** 2).mean())
    error = np.abs(y.astype(np.float64) - expected.astype(np.float64)).max() / scale
    assert error < {"float16": 0.01, "bfloat16": 0.06}[dtype]
    np.testing.assert_allclose(squares, square_parts(total), rtol=2e-3)
    return (y, total, squares), (expected, expected_total)


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize("kind", ADDING)
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_the_body_without_a_kernel(kind: str, bits: int, shown: bool) -> None:
    """On the CPU a half-precision graph has no kernels, and the library is not registered."""
    feeds = layer_feeds(np.random.default_rng(0), kind, bits, (64, 96, 40), tokens=3, dtype="float16")
    form = {"native": False, "provider": "CPUExecutionProvider", "shown": shown}
    (_, total, _), (_, expected) = both_ways(kind, bits, (64, 96, 40), feeds, "float16", **form)
    np.testing.assert_allclose(total, expected, rtol=2e-3, atol=2e-3)  # ONNX Runtime leaves roundings out


# Sizes that each kernel of products takes, and numbers of columns that are no whole number of loads of a thread.
SIZES = st.tuples(
    st.sampled_from([40, 64, 1031, 2048, 4096]),
    st.sampled_from([32, 96, 160, 544, 2048, 4096, 8192, 9216]),
    st.sampled_from([40, 264, 1024, 4096, 12288]),
)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ADDING)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    bits=st.sampled_from([0, 4, 4, 8]),
    dtype=st.sampled_from(["float16", "bfloat16"]),
    sizes=SIZES,
    tokens=st.sampled_from([1, 1, 1, 2, 5, 17, 40, 300]),
    seed=st.integers(0, 2**16),
)
def test_the_numbers_of_the_nodes_before(
    kind: str, bits: int, dtype: str, sizes: tuple[int, int, int], tokens: int, seed: int
) -> None:
    feeds = layer_feeds(np.random.default_rng(seed), kind, bits, sizes, tokens=tokens, dtype=dtype)
    first, (_, expected) = both_ways(kind, bits, sizes, feeds, dtype)
    np.testing.assert_array_equal(first[1].view(np.uint16), expected.view(np.uint16))
    np.testing.assert_array_equal(first[2], square_parts(first[1]))
    again = run_all(session(kind, bits, *sizes, dtype=dtype, sums=True), feeds)
    for mine, other in zip(again, first, strict=True):
        np.testing.assert_array_equal(mine.view(np.uint8), other.view(np.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_the_norm_alone_has_the_bits_of_the_norm_within(tokens: int, bits: int) -> None:
    """So a graph that also lists rows, which needs the norm itself, reads the same ones."""
    sizes = (64, 4096, 264)
    feeds = layer_feeds(np.random.default_rng(tokens), "row", bits, sizes, tokens=tokens, dtype="float16")
    within = run_all(session("row", bits, *sizes, dtype="float16", sums=True), feeds)
    y, total, norm, squares = run_all(session("row", bits, *sizes, dtype="float16", sums=True, shown=True), feeds)
    for mine, other in zip((y, total, squares), within, strict=True):
        np.testing.assert_array_equal(mine.view(np.uint8), other.view(np.uint8))
    sums = total.astype(np.float64)
    exact = sums / np.sqrt((sums**2).mean(axis=-1, keepdims=True) + EPSILON) * feeds["norm_weight"]
    np.testing.assert_allclose(norm, exact, rtol=2e-3, atol=1e-6)


MESSAGES = [
    (
        "residual",
        (1, 1, 63),
        r"RowLinearAdd4: residual: expected shape \[1, 1, 64\], as the call has 1 tokens and w 64 columns",
    ),
    ("x", (1, 1, 39), r"RowLinearAdd4: x: expected shape \[.., 40\], as w has 40 rows, got \[1, 1, 39\]"),
    ("norm_weight", (63,), r"RmsRowLinear4: norm_weight: expected shape \[64\], as w has 64 rows, got \[63\]"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "shape", "message"), MESSAGES)
def test_shapes_that_do_not_fit(name: str, shape: tuple[int, ...], message: str) -> None:
    feeds = layer_feeds(np.random.default_rng(4), "row", 4, (40, 64, 40), tokens=1, dtype="float16")
    feeds[name] = np.ones(shape, feeds[name].dtype)
    with pytest.raises(Exception, match=message):
        run_all(session("row", 4, 40, 64, 40, dtype="float16", sums=True), feeds)
