"""Bodies and kernels of GatedActivation and CallStart against plain numpy."""

from __future__ import annotations

import functools
import math

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tda_export.graph import contract, operators
from tda_export.graph.call_start import call_start, call_start_function
from tda_export.graph.gated_activation import gated_activation, gated_activation_functions
from tda_export.graph.ops import DTYPES, IR_VERSION, MICROSOFT, OPSET, Ops
from tda_export.models.spec import Activation
from tests.ffn_model import NUMPY_DTYPES, TOLERANCES, array_of, ort_value
from tests.sessions import CPU, CUDA, small_session

ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh", "relu")
WAYS = [
    pytest.param(CPU, False, "float32", id="body"),
    pytest.param(CPU, True, "float32", id="cpu"),
    *(pytest.param(CUDA, True, dtype, id=f"cuda-{dtype}", marks=pytest.mark.gpu) for dtype in ("float16", "bfloat16")),
]


def open_model(
    ops: Ops, inputs: list[ir.Value], outputs: list[ir.Value], functions: list[ir.Function], provider: str, native: bool
) -> ort.InferenceSession:
    imports = {"": OPSET, MICROSOFT: 1, operators.FUNCTION_DOMAIN: 1}
    graph = ir.Graph(inputs, outputs, nodes=ops.tape.nodes, opset_imports=imports, name="one")
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION, functions=functions))
    return small_session(model.SerializeToString(), provider, native=native)


@functools.cache
def gated_session(
    activation: Activation, packed: bool, dtype: str, provider: str, native: bool
) -> ort.InferenceSession:
    names = ("gate",) if packed else ("gate", "up")
    inputs = [ir.Value(name=name, type=ir.TensorType(DTYPES[dtype])) for name in names]
    ops = Ops()
    h = gated_activation(ops, activation, *inputs)
    h.name, h.type = "h", ir.TensorType(DTYPES[dtype])
    return open_model(ops, inputs, [h], gated_activation_functions(activation), provider, native)


def activated(activation: Activation, x: np.ndarray) -> np.ndarray:
    if activation == "silu":
        return x / (1 + np.exp(-x))
    if activation == "relu":
        return np.maximum(x, 0)
    if activation == "gelu":
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(("provider", "native", "dtype"), WAYS)
@settings(max_examples=40)
@given(
    activation=st.sampled_from(ACTIVATIONS),
    packed=st.booleans(),
    tokens=st.sampled_from([1, 2, 5, 64]),
    neurons=st.one_of(st.integers(1, 40), st.sampled_from([96, 264, 2048, 3001])),
    seed=st.integers(0, 2**16),
)
def test_gated_activation(
    provider: str, native: bool, dtype: str, activation: Activation, packed: bool, tokens: int, neurons: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    gate, up = (2 * rng.standard_normal((2, 1, tokens, neurons))).astype(NUMPY_DTYPES[dtype])
    session = gated_session(activation, packed, dtype, provider, native)
    feeds = {"gate": np.concatenate([gate, up], axis=-1)} if packed else {"gate": gate, "up": up}
    (h,) = session.run_with_ort_values(["h"], {name: ort_value(value) for name, value in feeds.items()})
    expected = activated(activation, gate.astype(np.float64)) * up.astype(np.float64)
    tolerance = TOLERANCES[dtype]
    np.testing.assert_allclose(array_of(h).astype(np.float64), expected, rtol=tolerance, atol=tolerance * 8)


@pytest.mark.gpu
@pytest.mark.parametrize("neurons", [8, 9], ids=["wide", "narrow"])
def test_a_gated_activation_of_more_tokens_than_a_grid_has_blocks(neurons: int) -> None:
    gate_up = np.random.default_rng(0).standard_normal((1, 65537, 2 * neurons)).astype(np.float16)
    session = gated_session("relu", True, "float16", CUDA, True)
    (h,) = session.run_with_ort_values(["h"], {"gate": ort_value(gate_up)})
    gate, up = np.split(gate_up.astype(np.float32), 2, axis=-1)
    np.testing.assert_array_equal(array_of(h), (np.maximum(gate, 0) * up).astype(np.float16))


@functools.cache
def start_session(operator: str, provider: str, native: bool) -> ort.InferenceSession:
    int64, int32, float32 = (
        ir.TensorType(dtype) for dtype in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.FLOAT)
    )
    inputs = [ir.Value(name=contract.INPUT_IDS, type=int64), ir.Value(name=contract.ATTENTION_MASK, type=int64)]
    inputs.append(ir.Value(name=contract.PRICE, type=float32))
    ops = Ops()
    if operator == operators.CALL_START:
        price, lengths = call_start(ops, *inputs)
        outputs, functions = [price, lengths.total, lengths.last_index], [call_start_function()]
    else:
        outputs, functions = [ops.op(operator, *inputs, domain=operators.FUNCTION_DOMAIN)], []
    for output, name, dtype in zip(outputs, operators.CALL_START_OUTPUTS, (float32, int64, int32), strict=False):
        output.name, output.type = name, dtype
    return open_model(ops, inputs, outputs, functions, provider, native)


@pytest.mark.parametrize(
    ("provider", "native", "operator"),
    [
        pytest.param(CPU, False, operators.CALL_START, id="body"),
        pytest.param(CPU, True, operators.CALL_START, id="cpu"),
        pytest.param(CUDA, True, operators.CALL_START, id="cuda", marks=pytest.mark.gpu),
        pytest.param(CPU, True, "CallPrice", id="earlier-cpu"),
        pytest.param(CUDA, True, "CallPrice", id="earlier-cuda", marks=pytest.mark.gpu),
    ],
)
@given(
    tokens=st.integers(1, 70),
    past=st.one_of(st.integers(0, 300), st.integers(2000, 9000)),
    room=st.integers(0, 50),
    price=st.floats(-1, 2.0**100, width=32),
)
def test_a_call_without_a_past_is_dense(
    provider: str, native: bool, operator: str, tokens: int, past: int, room: int, price: float
) -> None:
    mask = np.zeros((1, tokens + past + room), np.int64)
    mask[0, : tokens + past] = 1
    feeds = {
        contract.INPUT_IDS: np.arange(tokens)[None],
        contract.ATTENTION_MASK: mask,
        contract.PRICE: np.array([price], np.float32),
    }
    session = start_session(operator, provider, native)
    expected = [np.float32(price) if past else 0.0, tokens + past, tokens + past - 1]
    found = session.run_with_ort_values(None, {name: ort_value(value) for name, value in feeds.items()})
    assert [array_of(value).tolist() for value in found] == [[value] for value in expected[: len(found)]]


@pytest.mark.parametrize(
    ("packed", "shapes", "text"),
    [
        (True, [(1, 1, 7)], r"gate: expected shape \[\.\., 2 \* neurons\], got \[1, 1, 7\]"),
        (False, [(1, 1, 6), (1, 2, 6)], r"up: expected shape \[1, 1, 6\], got \[1, 2, 6\]"),
    ],
)
def test_shapes_that_do_not_fit(packed: bool, shapes: list[tuple[int, ...]], text: str) -> None:
    session = gated_session("silu", packed, "float32", CPU, True)
    feeds = {node.name: np.zeros(shape, np.float32) for node, shape in zip(session.get_inputs(), shapes, strict=True)}
    with pytest.raises(Exception, match=text):
        session.run(None, feeds)
