"""Nodes that follow one another as one node: `tda::Subgraph`, for float32 artifacts of the priced layout.

On the CPU a step of a small model is a hundred and more nodes of a few microseconds each, and as much time passes
between them: ONNX Runtime hands every loop to its threads anew, and every node its tensors. The native library runs all
of a Subgraph's nodes by one team of threads (`native/subgraph_cpu.cc`), with the kernels that it has for them. The
function's body is the nodes themselves with the bodies of their functions, so without the library nothing changes.
docs/artifact-format.md describes the attribute `nodes`, which says what there is inside.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

from tda_export.graph import operators
from tda_export.graph.fused import flat
from tda_export.graph.ops import MICROSOFT, OPSET

NODES = "nodes"
LEFT_OUT = "-"
_PRODUCTS = (operators.ROW_LINEAR, operators.NORM_ROW_LINEAR, operators.GATED_ROW_LINEAR)
# What has a kernel for float32 on the CPU, with the dtypes of its outputs; the last stands for all that follow it.
# ONNX Runtime cannot ask the library for them, since a Subgraph's outputs may have any.
_FLOATS = (ir.DataType.FLOAT,)
KERNELS: dict[str, tuple[ir.DataType, ...]] = {
    **{name + form: _FLOATS for name in _PRODUCTS for form in ("", "4", "8")},
    **{operators.linear_of(bits): _FLOATS for bits in operators.INTEGER_BITS},
    operators.CALL_START: (ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.INT32),
    operators.GATED_ACTIVATION: _FLOATS,
    operators.ADD_NORM: _FLOATS,
    operators.ADD_BIAS_NORM: _FLOATS,
    operators.ATTENTION: _FLOATS,
    operators.ATTENTION_16: (ir.DataType.FLOAT, ir.DataType.FLOAT16),
    operators.ATTENTION_8: (ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.INT8, ir.DataType.FLOAT),
    operators.GREEDY_TOKEN: (ir.DataType.INT64,),
}


def group(model: ir.Model) -> ir.Model:
    """Replace nodes that have kernels by as few Subgraphs as they allow, and define their functions.

    Args:
        model: A graph in float32, which is changed. No node of it has a graph of its own, such as If.

    Returns:
        The model.
    """
    for number, members in enumerate(_groups(list(model.graph))):
        _replace(model, members, "" if number == 0 else str(number))
    model.graph.sort()
    return model


def operators_of(graph: ir.Graph) -> set[str]:
    """Name the operators of a graph's nodes, those inside of Subgraphs among them."""
    names = {node.op_type for node in graph}
    for node in graph:
        if _is(node, (operators.SUBGRAPH,)):
            names |= {line.split(maxsplit=1)[0] for line in node.attributes[NODES].as_string().splitlines()}
    return names


def _is(node: ir.Node, names: Collection[str]) -> bool:
    return node.domain == operators.FUNCTION_DOMAIN and node.op_type in names


def _groups(nodes: Sequence[ir.Node]) -> list[list[ir.Node]]:
    """Distribute nodes that have kernels to groups of two or more: each joins the last group, unless it needs what
    another node makes of that group's results."""
    groups: list[list[ir.Node]] = []
    members: set[ir.Node] = set()
    behind: set[ir.Node] = set()  # other nodes that need results of the last group
    for node in nodes:
        makers = {value.producer() for value in node.inputs if value is not None} - {None}
        if not _is(node, KERNELS):
            if makers & (members | behind):
                behind.add(node)
        elif groups and not makers & behind:
            groups[-1].append(node)
            members.add(node)
        else:
            groups.append([node])
            members, behind = {node}, set()
    return [each for each in groups if len(each) > 1]


def _replace(model: ir.Model, members: Sequence[ir.Node], overload: str) -> None:
    """Put one node in the place of its members; the graph is sorted afterwards."""
    inside = set(members)
    taken = list(
        dict.fromkeys(
            value for node in members for value in node.inputs if value is not None and value.producer() not in inside
        )
    )
    given = [
        value
        for node in members
        for value in node.outputs
        if value.is_graph_output() or any(use.node not in inside for use in value.uses())
    ]
    for node in members:
        dtypes = KERNELS[node.op_type]
        for place, value in enumerate(node.outputs):
            value.type = value.type or ir.TensorType(dtypes[min(place, len(dtypes) - 1)])
    text = _text(members, taken, given)
    function = _function(model, members, taken, given, overload)
    model.functions[function.identifier()] = function
    together = ir.Node(
        operators.FUNCTION_DOMAIN,
        operators.SUBGRAPH,
        taken,
        [ir.AttrString(NODES, text)],
        overload=overload,
        num_outputs=len(given),
    )
    for old, new in zip(given, together.outputs, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
    ir.convenience.replace_nodes_and_values(model.graph, members[-1], members, [together], given, together.outputs)


def _text(members: Sequence[ir.Node], taken: Sequence[ir.Value], given: Sequence[ir.Value]) -> str:
    """Write the attribute."""
    names = {value: f"i{place}" for place, value in enumerate(taken)}
    names |= {value: f"o{place}" for place, value in enumerate(given)}
    inner = (value for node in members for value in node.outputs if value not in names)
    names |= {value: f"v{place}" for place, value in enumerate(inner)}
    lines = []
    for node in members:
        places = [
            ",".join(LEFT_OUT if value is None else names[value] for value in values)
            for values in (node.inputs, node.outputs)
        ]
        attributes = [f"{name}={_shown(attribute)}" for name, attribute in node.attributes.items()]
        lines.append(" ".join([node.op_type, *places, *attributes]))
    return "\n".join(lines)


def _shown(attribute: ir.Attr) -> str:
    if attribute.type == ir.AttributeType.STRING:
        text = attribute.as_string()
        assert len(text.split()) == 1, "words of a line are apart by spaces"
        return text
    return repr(attribute.as_float() if attribute.type == ir.AttributeType.FLOAT else attribute.as_int())


def _function(
    model: ir.Model, members: Sequence[ir.Node], taken: Sequence[ir.Value], given: Sequence[ir.Value], overload: str
) -> ir.Function:
    """Define what the Subgraph computes: its nodes, with the bodies of their functions."""
    copies = {value: ir.Value(name=f"input_{place}") for place, value in enumerate(taken)}
    nodes = []
    for node in members:
        copy = ir.Node(
            node.domain,
            node.op_type,
            [None if value is None else copies[value] for value in node.inputs],
            node.attributes.values(),
            overload=node.overload,
            num_outputs=len(node.outputs),
        )
        copies |= zip(node.outputs, copy.outputs, strict=True)
        nodes.append(copy)
    inputs, outputs = ([copies[value] for value in values] for values in (taken, given))
    for place, value in enumerate(outputs):
        value.name = f"output_{place}"
    imports = {"": OPSET, MICROSOFT: 1, operators.FUNCTION_DOMAIN: 1}
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports=imports, name=operators.SUBGRAPH)
    function = ir.Function(
        operators.FUNCTION_DOMAIN, operators.SUBGRAPH, overload, graph=graph, attributes=[ir.AttrString(NODES, "")]
    )
    called = dict.fromkeys(node.op_identifier() for node in members)
    return flat(function, [model.functions[identifier] for identifier in called])
