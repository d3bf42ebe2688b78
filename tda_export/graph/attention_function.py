"""`tda::Attention`: ONNX Runtime's GroupQueryAttention as a function, which a native kernel may replace."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from tda_export.graph import operators
from tda_export.graph.attention import group_query_attention
from tda_export.graph.decoder import GraphBuilder
from tda_export.graph.ops import MICROSOFT, OPSET, Ops

PACKED = "packed"  # the function's overload: queries, keys and values in one input
# What GroupQueryAttention takes where an attribute is left out.
DEFAULTS: dict[str, float] = {"scale": 0.0, "softcap": 0.0}
INTEGERS = ("num_heads", "kv_num_heads", "local_window_size", "do_rotary", "rotary_interleaved")
WIDTH = "width"


class StepGraphBuilder(GraphBuilder):
    """Builds attention as a function; for graphs of few tokens at a time."""

    def attend(self, inputs: Sequence[ir.Value | None], settings: dict[str, float]) -> list[ir.Value]:
        width = self.spec.num_heads * self.spec.head_size
        return attention_node(self.ops, inputs, width=width, **settings)


def attention_node(ops: Ops, inputs: Sequence[ir.Value | None], **settings: float) -> list[ir.Value]:
    """Add the node: inputs by `operators.ATTENTION_INPUTS`, outputs as `attention.Attend` says."""
    return ops.multi(
        operators.ATTENTION,
        *inputs,
        outputs=(True, True, True),
        domain=operators.FUNCTION_DOMAIN,
        overload=PACKED if inputs[1] is None else "",
        **(DEFAULTS | settings),
    )


def attention_functions() -> list[ir.Function]:
    """Define `tda::Attention` for queries, keys and values in three inputs and in one."""
    return [_function(packed=False), _function(packed=True)]


def _function(*, packed: bool) -> ir.Function:
    ops = Ops()
    inputs = [ir.Value(name=name) for name in operators.ATTENTION_INPUTS]
    query, key, value, *rest = inputs
    numbers = {name: ir.RefAttr(name, name, ir.AttributeType.INT) for name in INTEGERS}
    numbers |= {name: ir.RefAttr(name, name, ir.AttributeType.FLOAT) for name in DEFAULTS}
    given = [query, None, None] if packed else [query, key, value]
    attended, *present = group_query_attention(ops, [*given, *rest], **numbers)
    if packed:
        # ONNX Runtime before 1.31 infers the width of Q, K and V together, which the next product refuses.
        width = ops.op("Constant", value_int=ir.RefAttr("value_int", WIDTH, ir.AttributeType.INT))
        by_axis = ops.op("Unsqueeze", width, ops.constant([0], "int64"))
        attended = ops.op("Reshape", attended, ops.op("Concat", ops.constant([0, 0], "int64"), by_axis, axis=0))
    outputs = [attended, *present]
    for output, name in zip(outputs, ("attended", "present_key", "present_value"), strict=True):
        output.name = name
    imports = {"": OPSET, MICROSOFT: 1}
    graph = ir.Graph(inputs, outputs, nodes=ops.tape.nodes, opset_imports=imports, name=operators.ATTENTION)
    attributes = [ir.AttrInt64(name, 0) for name in (*INTEGERS, WIDTH)]
    attributes += [ir.AttrFloat32(name, value) for name, value in DEFAULTS.items()]
    overload = PACKED if packed else ""
    return ir.Function(operators.FUNCTION_DOMAIN, operators.ATTENTION, overload, graph=graph, attributes=attributes)
