"""Products that make their own input: `tda::NormRowLinear` and `tda::GatedRowLinear`, each with the forms of RowLinear.

A step of one token is bound by what every kernel costs apart from its bytes. So where only one RowLinear reads a norm
of AddNorm, or the product of a GatedActivation, both nodes become one. Its function has the bodies of both, so an ONNX
Runtime without a kernel for it computes what it computed before.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from tda_export.graph import operators
from tda_export.graph.integer_linear import COLUMNS, EARLY, GROUP
from tda_export.graph.ops import IR_VERSION, OPSET, Ops
from tda_export.graph.row_linear import WITH_BIAS

ROW_LINEARS = (operators.ROW_LINEAR, *(operators.row_linear_of(bits) for bits in operators.INTEGER_BITS))
FUSED = {operators.ADD_NORM: operators.NORM_ROW_LINEAR, operators.GATED_ACTIVATION: operators.GATED_ROW_LINEAR}
TAKEN = {operators.ADD_NORM: operators.NORM_INPUTS, operators.GATED_ACTIVATION: operators.GATED_INPUTS}
ATTRIBUTES = {
    operators.ADD_NORM: (ir.AttrFloat32("epsilon", 1e-6),),
    operators.GATED_ACTIVATION: (ir.AttrString("activation", "silu"),),
}
OWN = {"": (), "4": (COLUMNS, GROUP), "8": (COLUMNS, GROUP)}  # attributes of RowLinear's forms


def fuse(model: ir.Model) -> None:
    """Replace pairs of nodes of a model of functions by one node each, and define the functions of these.

    The results are the same, bit for bit: these functions have the bodies of the functions that they replace.
    """
    order = {node: place for place, node in enumerate(model.graph)}
    for node in order:
        if node.domain != operators.FUNCTION_DOMAIN or node.op_type not in ROW_LINEARS:
            continue
        x = node.inputs[0]
        maker = x.producer() if x is not None else None
        if maker is None or maker.domain != operators.FUNCTION_DOMAIN or maker.op_type not in FUSED:
            continue
        if x is not maker.outputs[0] or len(x.uses()) != 1 or x.is_graph_output():
            continue
        if EARLY in maker.attributes and not maker.attributes[EARLY].as_int():
            continue  # the kernel reads a norm's weight early
        if any(order[use.node] < order[node] for value in maker.outputs[1:] for use in value.uses()):
            continue  # `together` stands where `node` was
        together = _together(maker, node)
        if together.op_identifier() not in model.functions:
            function = flat(_function(maker, node), [model.functions[each.op_identifier()] for each in (maker, node)])
            model.functions[function.identifier()] = function
        _replace(model.graph, maker, node, together)


def _together(maker: ir.Node, node: ir.Node) -> ir.Node:
    """Make the node that does what both do."""
    places = len(TAKEN[maker.op_type])
    taken = [*maker.inputs, *[None] * (places - len(maker.inputs))]
    attributes = [own for own in maker.attributes.values() if own.name != EARLY]
    return ir.Node(
        operators.FUNCTION_DOMAIN,
        FUSED[maker.op_type] + form_of(node),
        [*taken, *node.inputs[1:]],
        [*attributes, *node.attributes.values()],
        overload=_overload(maker, node),
        num_outputs=len(node.outputs) + len(maker.outputs) - 1,
    )


def _replace(graph: ir.Graph, maker: ir.Node, node: ir.Node, together: ir.Node) -> None:
    """Put `together` where `node` was. All inputs exist there."""
    before, after = [node.outputs[0], *maker.outputs[1:]], together.outputs
    for old, new in zip(before, after, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node, maker], [together], before, after)


def name_of(node: ir.Node) -> str:
    """Return the name of a product without its form."""
    return node.op_type.rstrip("48")


def form_of(node: ir.Node) -> str:
    """Return the end of a product's name: the bits of codes, or nothing."""
    return node.op_type.removeprefix(name_of(node))


def _overload(maker: ir.Node, node: ir.Node) -> str:
    """Name the overload: an input that is absent cannot reach the nodes of a body."""
    return "_".join(filter(None, [maker.overload, node.overload]))


def _function(maker: ir.Node, node: ir.Node) -> ir.Function:
    """Define what `_together` calls: the one function after the other."""
    ops, form = Ops(), form_of(node)
    taken = [ir.Value(name=name) for name in TAKEN[maker.op_type]]
    rows = [ir.Value(name=name) for name in _row_inputs(form, biased=node.overload == WITH_BIAS)]
    passed = [value for value, given in zip(taken, maker.inputs, strict=False) if given is not None]
    references = {
        attribute.name: ir.RefAttr(attribute.name, attribute.name, attribute.type)
        for attribute in ATTRIBUTES[maker.op_type]
    }
    if EARLY in maker.attributes:
        references[EARLY] = ir.RefAttr(EARLY, EARLY, ir.AttributeType.INT)
    x, *others = ops.multi(
        maker.op_type,
        *passed,
        outputs=[True] * len(maker.outputs),
        domain=operators.FUNCTION_DOMAIN,
        overload=maker.overload,
        **references,
    )
    y = ops.op(
        node.op_type,
        x,
        *rows,
        domain=operators.FUNCTION_DOMAIN,
        overload=node.overload,
        **{name: ir.RefAttr(name, name, ir.AttributeType.INT) for name in (*OWN[form], EARLY)},
    )
    outputs = [y, *others]
    for number, value in enumerate(outputs):
        value.name = f"output_{number}"
    name = FUSED[maker.op_type] + form
    imports = {"": OPSET, operators.FUNCTION_DOMAIN: 1}
    graph = ir.Graph([*taken, *rows], outputs, nodes=ops.tape.nodes, opset_imports=imports, name=name)
    attributes = [*ATTRIBUTES[maker.op_type], *(ir.AttrInt64(each, 0) for each in (*OWN[form], EARLY))]
    return ir.Function(operators.FUNCTION_DOMAIN, name, _overload(maker, node), graph=graph, attributes=attributes)


def flat(function: ir.Function, called: Sequence[ir.Function]) -> ir.Function:
    """Put the bodies of the called functions in the place of the calls: ONNX Runtime infers no types through calls
    inside of functions."""
    for each in called:
        function.opset_imports.update(each.opset_imports)
    model = ir.Model(
        ir.Graph([], [], nodes=[], opset_imports=dict(function.opset_imports)),
        ir_version=IR_VERSION,
        functions=[function, *called],
    )
    InlinePass(lambda other: other is not function)(model)
    return function


def _row_inputs(form: str, *, biased: bool) -> Sequence[str]:
    """Name the inputs of a form of RowLinear after x."""
    names = operators.INTEGER_ROW_LINEAR_INPUTS if form else operators.ROW_LINEAR_INPUTS
    return names[1:] if biased else names[1:-1]
