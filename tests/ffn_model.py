"""Models of one IndexedFFN node whose weights are inputs, and the slow reference: one neuron and token at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from hypothesis import strategies as st

from tda_export.graph import operators
from tda_export.graph.ffn import FfnForm, indexed_ffn, indexed_ffn_function
from tda_export.graph.ops import DTYPES, IR_VERSION, MICROSOFT, OPSET, Ops
from tests.sessions import CPU, CUDA, small_session

NUMPY_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
FIXED_DTYPES = {"mask_indices": "int32", "neuron_scale": "float32", "token_thresholds": "float32"}
PROVIDERS = {"float32": CPU, "float16": CUDA, "bfloat16": CUDA}
# Relative error of a sum of rounded products. Half-precision results are rounded once, at the end.
TOLERANCES = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}

forms = st.builds(
    FfnForm,
    activation=st.sampled_from(["silu", "gelu", "gelu_tanh", "relu"]),
    gated=st.booleans(),
    bias=st.booleans(),
    two_levels=st.booleans(),
)


def input_names(form: FfnForm, down_bias: bool) -> list[str]:
    present = {*form.inputs, *(["b_down"] if down_bias else [])}
    return [name for name in operators.INDEXED_FFN_INPUTS if name in present]


def ffn_session(
    form: FfnForm, *, down_bias: bool = False, layer: int = 0, dtype: str = "float32", native: bool = True
) -> ort.InferenceSession:
    """Make a session on the CPU for float32 and on CUDA otherwise. Without `native` the function body runs."""
    inputs = {
        name: ir.Value(name=name, type=ir.TensorType(DTYPES[FIXED_DTYPES.get(name, dtype)]))
        for name in input_names(form, down_bias)
    }
    ops = Ops()
    y = indexed_ffn(ops, form, layer, inputs)
    y.name, y.type = "y", ir.TensorType(DTYPES[dtype])
    imports = {"": OPSET, MICROSOFT: 1, operators.FUNCTION_DOMAIN: 1}
    graph = ir.Graph(list(inputs.values()), [y], nodes=ops.tape.nodes, opset_imports=imports, name="ffn")
    functions = (indexed_ffn_function(form, down_bias=down_bias),)
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION, functions=functions))
    return small_session(model.SerializeToString(), PROVIDERS[dtype], native=native)


def run(session: ort.InferenceSession, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    """Run with numpy arrays, whose dtypes may be those of ml_dtypes."""
    values = {name: ort_value(feeds[name]) for name in (item.name for item in session.get_inputs())}
    (y,) = session.run_with_ort_values(["y"], values)
    return array_of(y)


def ort_value(array: np.ndarray) -> Any:
    array = np.asarray(array, order="C")
    if array.dtype == ml_dtypes.bfloat16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), int(ir.DataType.BFLOAT16))
    return ort.OrtValue.ortvalue_from_numpy(array)


def array_of(value: Any) -> np.ndarray:
    if value.data_type() != "tensor(bfloat16)":
        return value.numpy()
    import ctypes

    count = math.prod(value.shape())
    bits = np.frombuffer((ctypes.c_uint16 * count).from_address(value.data_ptr()), np.uint16).copy()
    return bits.view(ml_dtypes.bfloat16).reshape(value.shape())


def random_feeds(
    rng: np.random.Generator,
    *,
    tokens: int,
    hidden: int,
    neurons: int,
    indices: np.ndarray,
    dtype: str,
    threshold: float,
) -> dict[str, np.ndarray]:
    """Return random inputs for any form. Weights are scaled so that results are of order one."""

    def draw(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(NUMPY_DTYPES[dtype])

    return {
        "x": draw(1, tokens, hidden),
        "mask_indices": indices.astype(np.int32),
        "w_gate": draw(neurons, hidden, scale=hidden**-0.5),
        "w_up": draw(neurons, hidden, scale=hidden**-0.5),
        "w_down": draw(neurons, hidden, scale=neurons**-0.5),
        "b_gate": draw(neurons, scale=0.3),
        "b_up": draw(neurons, scale=0.3),
        "b_down": draw(hidden, scale=0.3),
        "neuron_scale": rng.uniform(0.5, 2.0, neurons).astype(np.float32),
        "token_thresholds": np.array([1e9, threshold, -1.0], np.float32),
    }


def activate(activation: str, value: np.ndarray) -> np.ndarray:
    if activation == "silu":
        return value / (1 + np.exp(-value))
    if activation == "relu":
        return np.maximum(value, 0)
    if activation == "gelu":
        return 0.5 * value * (1 + np.vectorize(math.erf)(value / math.sqrt(2)))
    return 0.5 * value * (1 + np.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))


def reference(
    form: FfnForm, feeds: Mapping[str, np.ndarray], *, down_bias: bool, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Compute in float64 y [1, S, M] and the estimates [S, K] that are compared with the threshold."""
    f = {name: np.asarray(value, np.float64) for name, value in feeds.items() if name != "mask_indices"}
    indices = feeds["mask_indices"]
    neurons, hidden = f["w_up"].shape
    kept = indices[(indices >= 0) & (indices < neurons)]
    x = f["x"].reshape(-1, hidden)
    y = np.zeros((len(x), hidden)) + (f["b_down"] if down_bias else 0)
    estimates = np.zeros((len(x), len(kept)))
    for t, k in np.ndindex(estimates.shape):
        i = kept[k]
        up = f["w_up"][i] @ x[t] + (f["b_up"][i] if form.bias else 0)
        gate = f["w_gate"][i] @ x[t] + (f["b_gate"][i] if form.bias and form.gated else 0) if form.gated else up
        activated = float(activate(form.activation, np.float64(gate)))
        estimates[t, k] = abs(activated) * f["neuron_scale"][i]
        if form.two_levels and estimates[t, k] < threshold:
            continue
        y[t] += (activated * up if form.gated else activated) * f["w_down"][i]
    return y.reshape(feeds["x"].shape), estimates
