"""The FFN half of a layer: dense in prefill, `tda::IndexedFFN` in decode."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tda_export.graph import contract
from tda_export.graph.ops import MICROSOFT, OPSET, Ops
from tda_export.graph.weights_file import WeightTable
from tda_export.models.spec import DecoderSpec


def activate(ops: Ops, activation: str, x: ir.Value) -> ir.Value:
    """Apply the activation function named in the spec."""
    if activation == "silu":
        return ops.op("Mul", x, ops.op("Sigmoid", x))
    raise AssertionError(f"no graph for activation {activation!r}")  # read_spec admits none other


def dense_activations(ops: Ops, spec: DecoderSpec, weights: WeightTable, layer: int, x: ir.Value) -> ir.Value:
    """Compute h [1, S, F] = act(gate · x) * (up · x) for every neuron from x [1, S, M]."""
    gate = ops.transposed_matmul(x, ops.weight(weights[contract.ffn_weight(layer, "gate")]))  # [1, S, F]
    up = ops.transposed_matmul(x, ops.weight(weights[contract.ffn_weight(layer, "up")]))  # [1, S, F]
    if spec.ffn_bias:
        gate = ops.op("Add", gate, ops.weight(weights[contract.ffn_bias(layer, "gate")]))
        up = ops.op("Add", up, ops.weight(weights[contract.ffn_bias(layer, "up")]))
    return ops.op("Mul", activate(ops, spec.activation, gate), up)


def dense_output(ops: Ops, weights: WeightTable, layer: int, h: ir.Value) -> ir.Value:
    """Sum the neurons' outputs: h [1, S, F] times the neuron-major W_down [F, M] gives [1, S, M], without bias."""
    return ops.op("MatMul", h, ops.weight(weights[contract.ffn_weight(layer, "down")]))


def indexed_ffn(
    ops: Ops, spec: DecoderSpec, weights: WeightTable, layer: int, x: ir.Value, mask_indices: ir.Value
) -> ir.Value:
    """Add the node that computes the FFN of x [1, S, M] from the rows in `mask_indices` alone, without output bias."""
    inputs = [ops.weight(weights[contract.ffn_weight(layer, part)]) for part in ("gate", "up", "down")]
    if spec.ffn_bias:
        inputs += [ops.weight(weights[contract.ffn_bias(layer, part)]) for part in ("gate", "up")]
    return ops.op(
        contract.INDEXED_FFN, x, mask_indices, *inputs, domain=contract.FUNCTION_DOMAIN, activation=spec.activation
    )


def indexed_ffn_function(spec: DecoderSpec) -> ir.Function:
    """Define `tda::IndexedFFN`: what any ONNX Runtime computes where no native kernel is registered.

    Inputs (`contract.INDEXED_FFN_INPUTS`): x [1, S, M], mask_indices [K] int32 (-1 pads), W_gate, W_up, W_down [F, M],
    and with biases b_gate and b_up [F]. Output: [1, S, M]. The body gathers the rows. For a padded entry it gathers
    row 0 and sets its activation to zero; an index below -1 becomes one past every row, which Gather refuses (on CUDA
    it reads nothing).
    """
    ops = Ops()
    inputs = [ir.Value(name=name) for name in contract.INDEXED_FFN_INPUTS[: 7 if spec.ffn_bias else 5]]
    x, indices, w_gate, w_up, w_down = inputs[:5]
    padded = ops.op("Equal", indices, ops.constant([contract.PADDING_INDEX], "int32"))  # [K]
    foreign = ops.op("Less", indices, ops.constant([contract.PADDING_INDEX], "int32"))  # [K]
    past_every_row = ops.constant([np.iinfo(np.int32).max], "int32")
    rows = ops.op("Where", padded, ops.constant([0], "int32"), ops.op("Where", foreign, past_every_row, indices))  # [K]
    gate = ops.transposed_matmul(x, ops.op("Gather", w_gate, rows, axis=0))  # [1, S, K]
    up = ops.transposed_matmul(x, ops.op("Gather", w_up, rows, axis=0))  # [1, S, K]
    if spec.ffn_bias:
        gate = ops.op("Add", gate, ops.op("Gather", inputs[5], rows, axis=0))
        up = ops.op("Add", up, ops.op("Gather", inputs[6], rows, axis=0))
    h = ops.op("Mul", activate(ops, spec.activation, gate), up)
    zero = ops.op("CastLike", ops.constant(0.0, "float32"), h)
    h = ops.op("Where", padded, zero, h)  # [1, S, K]
    y = ops.op("MatMul", h, ops.op("Gather", w_down, rows, axis=0))  # [1, S, M]
    y.name = "y"
    graph = ir.Graph(inputs, [y], nodes=ops.tape.nodes, opset_imports={"": OPSET, MICROSOFT: 1}, name="IndexedFFN")
    return ir.Function(
        contract.FUNCTION_DOMAIN,
        contract.INDEXED_FFN,
        graph=graph,
        attributes=[ir.AttrString("activation", spec.activation)],
    )
