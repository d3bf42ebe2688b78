"""`tda::GreedyToken`: the likeliest token, chosen on the device that holds the logits."""

from __future__ import annotations

import onnx_ir as ir

from tda_export.graph import contract, operators
from tda_export.graph.ops import IR_VERSION, OPSET, Ops

NOT_FINITE = -1


def greedy_tokens(ops: Ops, logits: ir.Value) -> ir.Value:
    """Add the node that chooses tokens, int64 [1, S], from logits, float32 [1, S, V]."""
    return ops.op(operators.GREEDY_TOKEN, logits, domain=operators.FUNCTION_DOMAIN)


def greedy_model(vocabulary: int) -> bytes:
    """Build a model of one such node, which chooses tokens from another graph's logits. Its input and output have the
    contract's names."""
    axes = ir.Shape([1, 1, vocabulary])
    logits = ir.Value(name=contract.LOGITS, shape=axes, type=ir.TensorType(ir.DataType.FLOAT))
    ops = Ops()
    tokens = greedy_tokens(ops, logits)
    tokens.name, tokens.shape = contract.GREEDY_TOKENS, ir.Shape([1, 1])
    tokens.type = ir.TensorType(ir.DataType.INT64)
    imports = {"": OPSET, operators.FUNCTION_DOMAIN: 1}
    graph = ir.Graph([logits], [tokens], nodes=ops.tape.nodes, opset_imports=imports, name="greedy")
    serialised: bytes = ir.to_proto(
        ir.Model(graph, ir_version=IR_VERSION, functions=[greedy_token_function()])
    ).SerializeToString()
    return serialised


def greedy_token_function() -> ir.Function:
    """Define `tda::GreedyToken`: the index of the largest logit, the first of equals; -1 where one is not finite."""
    ops = Ops()
    logits = ir.Value(name="logits")
    best = ops.op("ArgMax", logits, axis=-1, keepdims=0)  # int64 [1, S]
    # Zero times a non-finite number is NaN, and so is every sum with it.
    spoiled = ops.op("ReduceSum", ops.op("Mul", logits, ops.constant(0.0, "float32")), ops.constant([-1], "int64"))
    spoiled = ops.op("IsNaN", ops.op("Squeeze", spoiled, ops.constant([-1], "int64")))  # bool [1, S]
    tokens = ops.op("Where", spoiled, ops.constant(NOT_FINITE, "int64"), best)
    tokens.name = "tokens"
    graph = ir.Graph([logits], [tokens], nodes=ops.tape.nodes, opset_imports={"": OPSET}, name=operators.GREEDY_TOKEN)
    return ir.Function(operators.FUNCTION_DOMAIN, operators.GREEDY_TOKEN, graph=graph, attributes=[])
