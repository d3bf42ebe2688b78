"""`tda::GreedyToken`: the likeliest token, chosen where the logits are."""

from __future__ import annotations

import onnx_ir as ir

from tda_export.graph import contract
from tda_export.graph.ops import OPSET, Ops

NOT_FINITE = -1


def greedy_tokens(ops: Ops, logits: ir.Value) -> ir.Value:
    """Add the node that chooses tokens, int64 [1, S], from logits, float32 [1, S, V]."""
    return ops.op(contract.GREEDY_TOKEN, logits, domain=contract.FUNCTION_DOMAIN)


def greedy_token_function() -> ir.Function:
    """Define `tda::GreedyToken`: the index of the largest logit, the first of equals; -1 where one is not finite."""
    ops = Ops()
    logits = ir.Value(name="logits")
    best = ops.op("ArgMax", logits, axis=-1, keepdims=0)  # int64 [1, S]
    # Zero times a number that is not finite is NaN, and so is every sum with it.
    spoiled = ops.op("ReduceSum", ops.op("Mul", logits, ops.constant(0.0, "float32")), ops.constant([-1], "int64"))
    spoiled = ops.op("IsNaN", ops.op("Squeeze", spoiled, ops.constant([-1], "int64")))  # bool [1, S]
    tokens = ops.op("Where", spoiled, ops.constant(NOT_FINITE, "int64"), best)
    tokens.name = "tokens"
    graph = ir.Graph([logits], [tokens], nodes=ops.tape.nodes, opset_imports={"": OPSET}, name=contract.GREEDY_TOKEN)
    return ir.Function(contract.FUNCTION_DOMAIN, contract.GREEDY_TOKEN, graph=graph, attributes=[])
