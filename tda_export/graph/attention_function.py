"""`tda::Attention`, `Attention8` and `Attention16`: attention as an ONNX function, which a native kernel may replace.

Attention is ONNX Runtime's GroupQueryAttention. Attention8 and Attention16 are the same over a cache of 8-bit codes and
of float16 (`stored_attention`).
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from tda_export.graph import kv_formats, operators
from tda_export.graph.attention import group_query_attention
from tda_export.graph.cache_formats import CACHE_FORMATS, CacheFormat
from tda_export.graph.decoder import GraphBuilder
from tda_export.graph.ops import MICROSOFT, OPSET, Ops
from tda_export.graph.stored_attention import stored_attention

PACKED = "packed"  # an overload: queries, keys and values in one input
# Overloads of Attention8 and Attention16 without rotary tables, since a body that uses the tables needs them.
NO_ROTARY, PACKED_NO_ROTARY = "no_rotary", "packed_no_rotary"
# GroupQueryAttention's defaults of attributes.
DEFAULTS: dict[str, float] = {"scale": 0.0, "softcap": 0.0}
INTEGERS = ("num_heads", "kv_num_heads", "local_window_size", "do_rotary", "rotary_interleaved")
WIDTH = "width"


class StepGraphBuilder(GraphBuilder):
    """Builds attention as a function."""

    def attend(self, inputs: Sequence[ir.Value | None], settings: dict[str, float]) -> list[ir.Value]:
        if self.shape.kv != kv_formats.KV_FLOAT:
            return stored_attention_node(self.ops, CACHE_FORMATS[self.shape.kv], inputs, **settings)
        width = self.spec.num_heads * self.spec.head_size
        return attention_node(self.ops, inputs, width=width, **settings)

    def attention_functions(self) -> list[ir.Function]:
        if self.shape.kv == kv_formats.KV_FLOAT:
            return attention_functions()
        return stored_attention_functions(CACHE_FORMATS[self.shape.kv], self.spec.head_size)


def prompt_graph_builder(dtype: str) -> type[GraphBuilder]:
    """Return the builder of graphs that read prompts.

    In float32, the CPU's kernel of the function reads prompts faster than GroupQueryAttention. In half precision
    GroupQueryAttention itself is made for them, on CUDA.
    """
    return StepGraphBuilder if dtype == "float32" else GraphBuilder


def attention_node(ops: Ops, inputs: Sequence[ir.Value | None], **settings: float) -> list[ir.Value]:
    """Add the node, with inputs in the order of `operators.ATTENTION_INPUTS` and the outputs of `attention.Attend`."""
    overload = PACKED if inputs[1] is None else ""
    return _node(ops, operators.ATTENTION, overload, inputs, operators.ATTENTION_OUTPUTS, settings)


def stored_attention_node(
    ops: Ops, format: CacheFormat, inputs: Sequence[ir.Value | None], **settings: float
) -> list[ir.Value]:
    """Add the node of a format's operator, with inputs in the order of `format.inputs` and the outputs of
    `attention.Attend`."""
    packed, rotary = inputs[1] is None, len(inputs) == len(format.inputs)
    overload = (PACKED if packed else "") if rotary else (PACKED_NO_ROTARY if packed else NO_ROTARY)
    return _node(ops, format.operator, overload, inputs, format.outputs, settings)


def _node(
    ops: Ops,
    name: str,
    overload: str,
    inputs: Sequence[ir.Value | None],
    outputs: Sequence[str],
    settings: dict[str, float],
) -> list[ir.Value]:
    return ops.multi(
        name,
        *inputs,
        outputs=(True,) * len(outputs),
        domain=operators.FUNCTION_DOMAIN,
        overload=overload,
        **(DEFAULTS | settings),
    )


def attention_functions() -> list[ir.Function]:
    """Define `tda::Attention` for queries, keys and values in three inputs, and for all in one input."""
    return [_function(packed=False), _function(packed=True)]


def stored_attention_functions(format: CacheFormat, head_size: int) -> list[ir.Function]:
    """Define a format's operator and all its overloads for heads of `head_size` elements."""
    return [
        _stored_function(format, overload, head_size, packed=packed, rotary=rotary)
        for overload, packed, rotary in (
            ("", False, True),
            (PACKED, True, True),
            (NO_ROTARY, False, False),
            (PACKED_NO_ROTARY, True, False),
        )
    ]


def _references(integers: Sequence[str]) -> dict[str, ir.Attr]:
    """Return references to the function's attributes of the same names."""
    references = {name: ir.RefAttr(name, name, ir.AttributeType.INT) for name in integers}
    return references | {name: ir.RefAttr(name, name, ir.AttributeType.FLOAT) for name in DEFAULTS}


def _function(*, packed: bool) -> ir.Function:
    ops = Ops()
    inputs = [ir.Value(name=name) for name in operators.ATTENTION_INPUTS]
    query, key, value, *rest = inputs
    given = [query, None, None] if packed else [query, key, value]
    attended, *present = group_query_attention(ops, [*given, *rest], **_references(INTEGERS))
    if packed:
        # ONNX Runtime before 1.31 infers the width of Q, K and V together, which the next product refuses.
        width = ops.op("Constant", value_int=ir.RefAttr("value_int", WIDTH, ir.AttributeType.INT))
        by_axis = ops.op("Unsqueeze", width, ops.constant([0], "int64"))
        attended = ops.op("Reshape", attended, ops.op("Concat", ops.constant([0, 0], "int64"), by_axis, axis=0))
    overload = PACKED if packed else ""
    return _defined(
        operators.ATTENTION,
        overload,
        ops,
        inputs,
        [attended, *present],
        operators.ATTENTION_OUTPUTS,
        (*INTEGERS, WIDTH),
    )


def _stored_function(format: CacheFormat, overload: str, head_size: int, *, packed: bool, rotary: bool) -> ir.Function:
    ops = Ops()
    names = format.inputs if rotary else format.inputs[: -len(operators.ROTARY_TABLES)]
    inputs = [ir.Value(name=name) for name in names]
    query, key, value, *rest = inputs
    given = [query, None, None] if packed else [query, key, value]
    outputs = stored_attention(ops, format, [*given, *rest], head_size, _references(INTEGERS))
    return _defined(format.operator, overload, ops, inputs, outputs, format.outputs, INTEGERS)


def _defined(
    name: str,
    overload: str,
    ops: Ops,
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    output_names: Sequence[str],
    integers: Sequence[str],
) -> ir.Function:
    for output, output_name in zip(outputs, output_names, strict=True):
        output.name = output_name
    imports = {"": OPSET, MICROSOFT: 1}
    graph = ir.Graph(inputs, outputs, nodes=ops.tape.nodes, opset_imports=imports, name=name)
    attributes = [ir.AttrInt64(integer, 0) for integer in integers]
    attributes += [ir.AttrFloat32(real, value) for real, value in DEFAULTS.items()]
    return ir.Function(operators.FUNCTION_DOMAIN, name, overload, graph=graph, attributes=attributes)
