"""Models of a norm or gated activation and the product that reads it, as two nodes or as the one that `fuse` makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from tda_export.graph import operators
from tda_export.graph.fused import fuse
from tda_export.graph.gated_activation import gated_activation, gated_activation_functions
from tda_export.graph.integer_linear import integer_functions, integer_row_linear
from tda_export.graph.linear import linear_functions
from tda_export.graph.ops import DTYPES, IR_VERSION, MICROSOFT, OPSET, Ops
from tda_export.graph.row_linear import row_linear, row_linear_functions
from tda_export.models.spec import Activation
from tda_export.weights.formats import IntegerFormat, integer_format
from tda_export.weights.matrix import Matrix
from tests.code_model import random_codes
from tests.ffn_model import NUMPY_DTYPES, PROVIDERS, array_of, ort_value
from tests.sessions import small_session

FIXED = {"scales": "float16", "zero_points": "uint8", "row_price": "float32", "price": "float32"}
EPSILON = 1e-5
# What is ahead of the matrix, by kind.
AHEAD = {"norm": operators.NORM_INPUTS, "gated": operators.GATED_INPUTS, "packed": operators.GATED_INPUTS[:1]}


def fused_session(
    kind: str,
    bits: int,
    columns: int,
    *,
    dtype: str,
    fused: bool,
    bias: bool = True,
    early: bool = False,
    activation: Activation = "silu",
    epsilon: float = EPSILON,
    native: bool = True,
    provider: str | None = None,
) -> ort.InferenceSession:
    """A session with outputs y and, for a norm, sum; `columns` of a matrix of codes of `bits` bits, 0 for elements.

    It is on CUDA, unless a provider is given.
    """
    matrix = Matrix("w", 1, columns, integer_format(bits), "input") if bits else None
    rows = (operators.INTEGER_ROW_LINEAR_INPUTS if matrix else operators.ROW_LINEAR_INPUTS)[1 : None if bias else -1]
    types = FIXED | ({"w": "uint8"} if matrix else {})
    names = (*AHEAD[kind], *rows)
    values = {name: ir.Value(name=name, type=ir.TensorType(DTYPES[types.get(name, dtype)])) for name in names}
    ahead, (weight, *others) = [values[name] for name in AHEAD[kind]], [values[name] for name in rows]
    ops, outputs = Ops(), []
    if kind == "norm":
        x, total = ops.multi(
            operators.ADD_NORM,
            *ahead,
            outputs=(True, True),
            domain=operators.FUNCTION_DOMAIN,
            epsilon=epsilon,
            early=1,
        )
        outputs.append(total)
    else:
        x = gated_activation(ops, activation, *ahead)
    if matrix:
        stored = [weight, *others[:2]]
        y = integer_row_linear(ops, matrix, x, stored, *others[2:], early=early)
    else:
        y = row_linear(ops, x, weight, *others, early=early)
    outputs.insert(0, y)
    for value, name in zip(outputs, ("y", "sum"), strict=False):
        value.name, value.type = name, ir.TensorType(DTYPES[dtype])
    functions = [*linear_functions(), *row_linear_functions(), *gated_activation_functions(activation)]
    functions += integer_functions([matrix] if matrix else [])
    imports = {"": OPSET, MICROSOFT: 1, operators.FUNCTION_DOMAIN: 1}
    graph = ir.Graph(list(values.values()), outputs, nodes=ops.tape.nodes, opset_imports=imports, name="fused")
    model = ir.Model(graph, ir_version=IR_VERSION, functions=functions)
    if fused:
        fuse(model)
    assert len(model.graph) == (1 if fused else 2)
    return small_session(ir.to_proto(model).SerializeToString(), provider or PROVIDERS[dtype], native=native)


def fused_feeds(
    rng: np.random.Generator, kind: str, bits: int, *, tokens: int, inputs: int, outputs: int, dtype: str
) -> dict[str, np.ndarray]:
    """Inputs at price 0, for every session of this kind."""

    def draw(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(NUMPY_DTYPES[dtype])

    width = 2 * inputs if kind == "packed" else inputs
    feeds = {name: draw(1, tokens, width) for name in AHEAD[kind]}
    if kind == "norm":
        feeds["norm_weight"] = draw(inputs)
    if bits:
        format: IntegerFormat = integer_format(bits)
        packed = random_codes(rng, format, inputs, outputs).pack()
        feeds |= dict(zip(("w", "scales", "zero_points"), packed, strict=True))
    else:
        feeds["w"] = draw(inputs, outputs, scale=inputs**-0.5)
    feeds["row_price"] = np.exp(rng.standard_normal(inputs)).astype(np.float32)
    feeds["price"] = np.zeros(1, np.float32)
    feeds["bias"] = draw(outputs, scale=0.3)
    return feeds


def run_all(session: ort.InferenceSession, feeds: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
    """Run with numpy arrays of any dtype that numpy has with ml_dtypes; return every output."""
    values = {item.name: ort_value(feeds[item.name]) for item in session.get_inputs()}
    results = session.run_with_ort_values([item.name for item in session.get_outputs()], values)
    return [array_of(value) for value in results]


def revealing_epsilon(x: np.ndarray, residual: np.ndarray) -> float:
    """Leave almost nothing of the mean square, so that its last bit, and the order of additions, shows in the norm."""
    total = (x.astype(np.float32) + residual.astype(np.float32)).astype(x.dtype).astype(np.float64)
    mean = float(np.mean(total**2))
    return -mean * (1 - 4e-6) if np.isfinite(mean) and mean > 0 else EPSILON
