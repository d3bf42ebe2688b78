"""`tda::CallStart`: what a call of the priced layout needs before its layers, its price and its lengths."""

from __future__ import annotations

import onnx_ir as ir

from tda_export.graph import contract, operators
from tda_export.graph.attention import Lengths, buffer_lengths, total_length
from tda_export.graph.ops import OPSET, Ops


def call_start(ops: Ops, input_ids: ir.Value, attention_mask: ir.Value, price: ir.Value) -> tuple[ir.Value, Lengths]:
    """Add the node; return the price of a call, float32 [1] (`price`, or 0 for a call without a past), and its
    lengths."""
    inputs = (input_ids, attention_mask, price)
    wanted = [True] * len(operators.CALL_START_OUTPUTS)
    chosen, total, last_index = ops.multi(
        operators.CALL_START, *inputs, outputs=wanted, domain=operators.FUNCTION_DOMAIN
    )
    return chosen, buffer_lengths(ops, attention_mask, total, last_index)


def call_start_function() -> ir.Function:
    """Define `tda::CallStart`. The price is 0 where attention_mask [1, T] counts no more tokens than input_ids [1, S].

    S is computed by a sum on the device, so that no shape is copied to the host.
    """
    ops = Ops()
    input_ids, mask, price = (ir.Value(name=name) for name in (contract.INPUT_IDS, contract.ATTENTION_MASK, "given"))
    ones = ops.op("Add", ops.op("Mul", input_ids, ops.constant(0, "int64")), ops.constant(1, "int64"))
    tokens = ops.op("ReduceSum", ones, ops.constant([1], "int64"), keepdims=0)  # int64 [1]: S
    total, last_index = total_length(ops, mask)
    chosen = ops.op("Where", ops.op("Greater", total, tokens), price, ops.constant([0.0], "float32"))
    outputs = [chosen, total, last_index]
    for value, name in zip(outputs, operators.CALL_START_OUTPUTS, strict=True):
        value.name = name
    graph = ir.Graph(
        [input_ids, mask, price], outputs, nodes=ops.tape.nodes, opset_imports={"": OPSET}, name=operators.CALL_START
    )
    return ir.Function(operators.FUNCTION_DOMAIN, operators.CALL_START, graph=graph, attributes=[])
