"""`tda::IndexedFFN` as a function, against the sum over neurons that it stands for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from tda_export.graph import contract
from tda_export.graph.ffn import indexed_ffn_function
from tda_export.graph.ops import IR_VERSION, MICROSOFT, OPSET
from tda_export.models.families import read_spec

SPEC = read_spec(LlamaConfig(architectures=["LlamaForCausalLM"]))


def session(
    biases: bool, element: ir.DataType = ir.DataType.FLOAT, providers: Sequence[str] = ("CPUExecutionProvider",)
) -> ort.InferenceSession:
    """A model of one IndexedFFN node whose weights are inputs."""
    spec = dataclasses.replace(SPEC, ffn_bias=biases)
    names = contract.INDEXED_FFN_INPUTS[: 7 if biases else 5]
    inputs = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.INT32 if name == "mask_indices" else element))
        for name in names
    ]
    node = ir.node(contract.INDEXED_FFN, inputs, {"activation": spec.activation}, domain=contract.FUNCTION_DOMAIN)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(element)
    imports = {"": OPSET, MICROSOFT: 1, contract.FUNCTION_DOMAIN: 1}
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports=imports, name="ffn")
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION, functions=(indexed_ffn_function(spec),)))
    return ort.InferenceSession(model.SerializeToString(), providers=list(providers))


SESSIONS = {biases: session(biases) for biases in (False, True)}


def reference(x: np.ndarray, indices: np.ndarray, gate, up, down, b_gate, b_up) -> np.ndarray:  # type: ignore[no-untyped-def]
    """One neuron and one token at a time, float64."""
    y = np.zeros(x.shape)
    for position in np.ndindex(x.shape[:2]):
        for i in indices[indices >= 0]:
            g = gate[i] @ x[position] + b_gate[i]
            y[position] += g / (1 + np.exp(-g)) * (up[i] @ x[position] + b_up[i]) * down[i]
    return y


@settings(deadline=None, max_examples=60)
@given(
    hidden=st.integers(1, 12),
    neurons=st.integers(1, 15),
    tokens=st.integers(1, 3),
    biases=st.booleans(),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_function_is_the_sum_over_its_indices(
    hidden: int, neurons: int, tokens: int, biases: bool, seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((1, tokens, hidden)).astype(np.float32)
    gate, up, down = rng.standard_normal((3, neurons, hidden)).astype(np.float32)
    b_gate, b_up = rng.standard_normal((2, neurons)).astype(np.float32) * biases
    kept = data.draw(st.lists(st.integers(0, neurons - 1), unique=True))
    padding = data.draw(st.integers(0 if kept else 1, 3))
    indices = np.array(sorted(kept) + [contract.PADDING_INDEX] * padding, np.int32)
    feeds = {"x": x, "mask_indices": indices, "w_gate": gate, "w_up": up, "w_down": down}
    feeds |= {"b_gate": b_gate, "b_up": b_up} if biases else {}
    (y,) = SESSIONS[biases].run(None, feeds)
    expected = reference(*(a.astype(np.float64) for a in (x,)), indices, gate, up, down, b_gate, b_up)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("index", [4, 100, -2, -7])
def test_index_that_is_no_neuron_is_an_error(index: int) -> None:
    weights = np.ones((3, 4, 2), np.float32)
    feeds = dict(zip(("w_gate", "w_up", "w_down"), weights, strict=True))
    feeds |= {"x": np.ones((1, 1, 2), np.float32), "mask_indices": np.array([0, index], np.int32)}
    with pytest.raises(Exception, match="out of data bounds"):
        SESSIONS[False].run(None, feeds)
