"""Models of one node with integer weights as inputs, and the slow reference in float64."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from tda_export.weights.formats import IntegerFormat
from tda_export.weights.integers import Codes
from tests.ffn_model import NUMPY_DTYPES, PROVIDERS
from tests.row_model import worth
from tests.sessions import small_session

TYPES = {"w": TensorProto.UINT8, "scales": TensorProto.FLOAT16, "zero_points": TensorProto.UINT8}
DOT_INPUTS = ("x", *TYPES)
ROW_INPUTS = (*DOT_INPUTS, "row_price", "price", "bias")


FLOATS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def code_session(
    format: IntegerFormat,
    columns: int,
    *,
    rows: bool,
    bias: bool = False,
    threads: int | None = None,
    group: int | None = None,
    dtype: str = "float32",
    early: bool = False,
    price: float | None = None,
) -> ort.InferenceSession:
    """Make a session of RowLinear4 or RowLinear8 (`rows`), or of Linear4 or Linear8. `group` replaces the format's.

    `price` is a constant of the model; by default it is an input. The session is on the CPU for activations of float32
    and on CUDA otherwise.
    """
    names = (ROW_INPUTS if bias else ROW_INPUTS[:-1]) if rows else DOT_INPUTS
    node = helper.make_node(
        f"{'Row' if rows else ''}Linear{format.bits}",
        names,
        ["y"],
        domain="tda",
        columns=columns,
        group=format.group if group is None else group,
        early=int(early),
    )
    types = TYPES | dict.fromkeys(("x", "bias"), FLOATS[dtype])
    constants = [] if price is None else [helper.make_tensor("price", TensorProto.FLOAT, [1], [price])]
    values = [
        helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), None)
        for name in names
        if name not in {constant.name for constant in constants}
    ]
    y = helper.make_tensor_value_info("y", FLOATS[dtype], None)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("tda", 1)]
    graph = helper.make_graph([node], "codes", values, [y], initializer=constants)
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    return small_session(model.SerializeToString(), PROVIDERS[dtype], threads=threads)


def random_codes(rng: np.random.Generator, format: IntegerFormat, rows: int, columns: int) -> Codes:
    """Return random codes of every value, scaled so that elements are of order one."""
    groups, most = format.groups(columns), format.levels - 1
    return Codes(
        format,
        rng.integers(0, format.levels, (rows, columns), dtype=np.uint8),
        (rng.uniform(0.2, 2.0, (rows, groups)) * rng.choice([-1, 1], (rows, groups)) / most).astype(np.float16),
        rng.integers(0, format.levels, (rows, groups), dtype=np.uint8),
    )


def feeds_of(codes: Codes, x: np.ndarray) -> dict[str, np.ndarray]:
    return {"x": x, **dict(zip(TYPES, codes.pack(), strict=True))}


def tolerance(x: np.ndarray, codes: Codes) -> float:
    """Return the tolerance of float32 sums, which add codes and zero points before they subtract one from the other."""
    largest = float(np.abs(codes.scales.astype(np.float64)).max()) * codes.format.levels
    return 2e-6 * max(1.0, float(np.linalg.norm(x, axis=-1).max(initial=0.0))) * max(1.0, largest)


def row_feeds(
    rng: np.random.Generator, format: IntegerFormat, inputs: int, outputs: int, count: int, dtype: str = "float32"
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the inputs of a product with rows at price 0, and the elements of its matrix."""
    codes = random_codes(rng, format, inputs, outputs)
    feeds = feeds_of(codes, rng.standard_normal((1, count, inputs)).astype(NUMPY_DTYPES[dtype]))
    feeds["row_price"] = np.exp(rng.standard_normal(inputs)).astype(np.float32)
    feeds["price"] = np.zeros(1, np.float32)
    feeds["bias"] = rng.standard_normal(outputs).astype(NUMPY_DTYPES[dtype])
    feeds["tolerance"] = np.array(tolerance(feeds["x"], codes))
    return feeds, codes.decode().astype(np.float64)


def row_reference(feeds: dict[str, np.ndarray], elements: np.ndarray, *, bias: bool) -> np.ndarray:
    """Compute y [1, S, out] in float64."""
    x = feeds["x"][0].astype(np.float64)
    kept = np.where(worth(feeds) < feeds["price"], 0, x)
    return (kept @ elements + (feeds["bias"].astype(np.float64) if bias else 0))[None]
