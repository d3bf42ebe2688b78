"""Threshold truncation (TT): the decode graph of the baseline that drops each token's own small neurons.

Sources: ReLU^2 Wins, arXiv 2402.03804, section 3; the TT baseline of TDA, arXiv 2408.11393. Whether a neuron is small
is known only after its gate and up products. So every gate row and up row is read, and only the down rows of kept
neurons: (2 + d) / 3 of the FFN's bytes, where d is the share of kept neurons. The graph uses only stock operators.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tda_export.graph import contract, kv_formats
from tda_export.graph.attention import attention_lengths
from tda_export.graph.attention_function import StepGraphBuilder
from tda_export.graph.contract import IoTensor
from tda_export.graph.decoder import model_shape
from tda_export.graph.ffn import dense_activations
from tda_export.graph.linear import FunctionGraphBuilder, linear_functions
from tda_export.graph.ops import Ops
from tda_export.graph.weights_file import WeightTable
from tda_export.models.spec import DecoderSpec

TINY = 1e-30  # guards the division of a token without any activation


def truncation_inputs(shape: contract.ModelShape) -> list[IoTensor]:
    """List the inputs of the threshold-truncation graph, which `eval` derives as a baseline; it is in no artifact."""
    return [
        *contract.dense_inputs(shape),
        IoTensor(contract.THRESHOLDS, "float32", (shape.num_layers,), default=True),
    ]


def truncation_outputs(shape: contract.ModelShape) -> list[IoTensor]:
    """List the outputs of the threshold-truncation graph."""
    return [
        IoTensor(contract.LOGITS, "float32", (1, "sequence_length", shape.vocab_size)),
        *contract.dense_outputs(shape)[1:],
        IoTensor(contract.KEPT_NEURONS, "int64", (shape.num_layers, "sequence_length")),
    ]


def build_truncation(spec: DecoderSpec, weights: WeightTable, dtype: str, *, kv: str = kv_formats.KV_FLOAT) -> ir.Model:
    """Build the graph that keeps, for every token, the neurons with r_i(t) >= the layer's threshold.

    Args:
        spec: The architecture.
        weights: The tensors of weights.bin, squared lengths of down columns among them.
        dtype: A value of `contract.DTYPES`.
        kv: How keys and values are stored, one of `kv_formats.KV_FORMATS`.

    Returns:
        The model with the inputs and outputs of `truncation_inputs` and `truncation_outputs`. The
        default thresholds are 0 and keep every neuron. `kept_neurons` int64 [L, S] counts the kept ones.
    """
    shape, half = model_shape(spec, dtype, kv), dtype != "float32"
    graph = (FunctionGraphBuilder if half else StepGraphBuilder)(spec, weights, dtype, truncation_inputs(shape), kv)
    ops, inputs, outputs = graph.ops, graph.inputs, graph.outputs
    kept: list[ir.Value] = []

    def ffn(layer: int, x: ir.Value) -> tuple[ir.Value, ir.Value | None]:
        h = dense_activations(graph, layer, x)  # [1, S, F]
        relative = _relative_magnitudes(ops, h, graph.weight(contract.down_squared_norms(layer)))
        threshold = ops.op("Gather", inputs[contract.THRESHOLDS], ops.constant(layer, "int64"), axis=0)  # scalar
        keep = ops.op("GreaterOrEqual", relative, threshold)  # bool [1, S, F]
        kept.append(ops.op("ReduceSum", ops.cast(keep, "int64"), ops.constant([2], "int64"), keepdims=0))  # [1, S]
        zero = ops.op("CastLike", ops.constant(0.0, "float32"), h)
        y = graph.product(ops.op("Where", keep, h, zero), contract.ffn_weight(layer, "down"))
        return y, graph.weight(contract.ffn_bias(layer, "down")) if spec.ffn_bias else None

    hidden = graph.layers(attention_lengths(ops, inputs[contract.ATTENTION_MASK]), ffn)
    outputs[contract.LOGITS] = graph.logits(hidden)
    outputs[contract.KEPT_NEURONS] = ops.op("Concat", *kept, axis=0)  # [L, S]
    defaults = {contract.THRESHOLDS: np.zeros(spec.num_layers, np.float32)}
    functions = [*graph.attention_functions(), *(linear_functions(spec.norm) if half else [])]
    return graph.model("truncation", truncation_outputs(shape), defaults, functions)


def _relative_magnitudes(ops: Ops, h: ir.Value, squared_norms: ir.Value) -> ir.Value:
    """Compute r_i(t) = m_i(t) / ||m(t)||, float32 [1, S, F], as prefill's statistics do."""
    h32 = ops.cast(h, "float32")
    squares = ops.op("Mul", ops.op("Mul", h32, h32), squared_norms)  # m_i(t)^2
    total = ops.op("ReduceSum", squares, ops.constant([2], "int64"), keepdims=1)  # [1, S, 1]
    return ops.op("Sqrt", ops.op("Div", squares, ops.op("Max", total, ops.constant(TINY, "float32"))))
