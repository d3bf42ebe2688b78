"""Models of one RowLinear node whose weights are inputs, and the slow reference: one row and token at a time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from tda_export.graph import operators
from tda_export.graph.ops import DTYPES, IR_VERSION, OPSET, Ops
from tda_export.graph.row_linear import row_linear, row_linear_functions
from tests.ffn_model import NUMPY_DTYPES, PROVIDERS
from tests.sessions import small_session

PRICES = (operators.RowLinearInput.ROW_PRICE, operators.RowLinearInput.PRICE)  # always float32


def row_session(
    *, bias: bool = False, early: bool = False, dtype: str = "float32", native: bool = True, threads: int | None = None
) -> ort.InferenceSession:
    """Make a session on the CPU for float32 and on CUDA otherwise. Without `native` the function body runs."""
    names = operators.ROW_LINEAR_INPUTS[: 5 if bias else 4]
    values = [ir.Value(name=name, type=ir.TensorType(DTYPES["float32" if name in PRICES else dtype])) for name in names]
    ops = Ops()
    y = row_linear(ops, *values)
    (node,) = ops.tape.nodes
    node.attributes.add(ir.AttrInt64("early", int(early)))
    y.name, y.type = "y", ir.TensorType(DTYPES[dtype])
    imports = {"": OPSET, operators.FUNCTION_DOMAIN: 1}
    graph = ir.Graph(values, [y], nodes=ops.tape.nodes, opset_imports=imports, name="rows")
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION, functions=row_linear_functions()))
    return small_session(model.SerializeToString(), PROVIDERS[dtype], native=native, threads=threads)


def random_rows(
    rng: np.random.Generator, *, tokens: int, inputs: int, outputs: int, dtype: str, zeros: float = 0.0
) -> dict[str, np.ndarray]:
    """Return random inputs at price 0, scaled so that results are of order one. `zeros`: the fraction of zeros in x."""

    def draw(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(NUMPY_DTYPES[dtype])

    x = draw(1, tokens, inputs)
    x[rng.random(x.shape) < zeros] = 0
    return {
        "x": x,
        "w": draw(inputs, outputs, scale=inputs**-0.5),
        "row_price": np.exp(rng.standard_normal(inputs)).astype(np.float32),
        "price": np.zeros(1, np.float32),
        "bias": draw(outputs, scale=0.3),
    }


def worth(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the estimates that are compared with the price, float32 [S, in]."""
    x = feeds["x"].astype(np.float32).reshape(-1, len(feeds["w"]))
    with np.errstate(invalid="ignore", over="ignore"):
        return (x * x * feeds["row_price"]).astype(np.float32)


def price_for(feeds: Mapping[str, np.ndarray], density: float) -> np.ndarray:
    """Return a price, float32 [1], at which about this fraction of rows is read."""
    values = np.sort(worth(feeds), axis=None)
    at = round((1 - density) * len(values))
    return np.full(1, values[at] if at < len(values) else np.inf, np.float32)


def reference(feeds: Mapping[str, np.ndarray], *, bias: bool) -> np.ndarray:
    """Compute y [.., out] in float64."""
    weight = feeds["w"].astype(np.float64)
    x = feeds["x"].astype(np.float64).reshape(-1, len(weight))
    with np.errstate(invalid="ignore"):
        kept = np.where(worth(feeds) < feeds["price"], 0, x)
        y = kept @ weight + (feeds["bias"].astype(np.float64) if bias else 0)
    return y.reshape(*feeds["x"].shape[:-1], weight.shape[1])
