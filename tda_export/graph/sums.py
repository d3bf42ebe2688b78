"""Products that add the residual, and leave the squares of the sum to the product that reads its norm.

In `NormRowLinear` every block of the kernel reads all of x and residual for their mean square, before it knows which
rows it needs. So where x is the result of a RowLinear that nothing else reads, that product adds the residual, and the
squares too: it becomes `tda::RowLinearAdd` or `tda::GatedRowLinearAdd`, and the norm's product `tda::RmsRowLinear`.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from tda_export.graph import operators
from tda_export.graph.fused import OWN, ROW_LINEARS, flat, form_of, name_of
from tda_export.graph.integer_linear import COLUMNS, EARLY
from tda_export.graph.ops import OPSET, Ops

ADDING = {
    operators.ROW_LINEAR: operators.ROW_LINEAR_ADD,
    operators.GATED_ROW_LINEAR: operators.GATED_ROW_LINEAR_ADD,
}
AHEAD = {operators.ROW_LINEAR: 1, operators.GATED_ROW_LINEAR: len(operators.GATED_INPUTS)}  # inputs ahead of w


def add_residuals(model: ir.Model) -> None:
    """Replace each NormRowLinear whose x is a product, and that product, and define the functions of the new nodes.

    The results are the same up to the order in which squares are added. Products whose columns are no whole number of
    square parts stay. Where a graph derived from the artifact's reads a norm in other places too, so that `fuse` has
    left AddNorm, it becomes `tda::RmsNorm`: both graphs compute the same numbers.
    """
    order = {node: place for place, node in enumerate(model.graph)}
    for node in list(order):
        if not _norms_for_one_product(node):
            continue
        x, residual = node.inputs[:2]
        assert x is not None
        assert residual is not None
        maker = x.producer()
        if maker is None or maker.domain != operators.FUNCTION_DOMAIN or name_of(maker) not in ADDING:
            continue
        if len(x.uses()) != 1 or x.is_graph_output() or _columns(maker) % operators.SQUARE_COLUMNS:
            continue
        before = residual.producer()
        if before is not None and order[before] > order[maker]:
            continue  # the sum is made where `maker` stands
        adding = _adding(model, maker, residual)
        norm = _norm(model, node, adding)
        order |= {adding: order[maker], norm: order[node]}
        model.graph.insert_after(maker, adding)
        old, new = list(node.outputs), [norm.outputs[0], adding.outputs[0]]
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [norm], old, new)
        model.graph.remove(maker, safe=True)


def _norms_for_one_product(node: ir.Node) -> bool:
    """Return whether a node is a NormRowLinear, or an AddNorm whose norm one RowLinear reads, and maybe other nodes."""
    if node.domain != operators.FUNCTION_DOMAIN:
        return False
    if name_of(node) == operators.NORM_ROW_LINEAR:
        return True
    if node.op_type != operators.ADD_NORM or not node.attributes[EARLY].as_int():
        return False
    users = [use.node for use in node.outputs[0].uses()]
    products = {user for user in users if user.domain == operators.FUNCTION_DOMAIN and user.op_type in ROW_LINEARS}
    return len(products) == 1


def _columns(node: ir.Node) -> int:
    """Return the number of columns of a product's matrix."""
    if COLUMNS in node.attributes:
        return node.attributes[COLUMNS].as_int()
    weight = node.inputs[AHEAD[node.op_type]]
    assert weight is not None
    assert weight.shape is not None
    columns = weight.shape[1]
    assert isinstance(columns, int)
    return columns


def _adding(model: ir.Model, maker: ir.Node, residual: ir.Value) -> ir.Node:
    """Make the node that adds the residual to what a product gives."""
    form = form_of(maker)
    name = ADDING[name_of(maker)] + form
    node = ir.Node(
        operators.FUNCTION_DOMAIN,
        name,
        [residual, *maker.inputs],
        maker.attributes.values(),
        overload=maker.overload,
        num_outputs=2,
    )
    total, squares = node.outputs
    total.type, total.shape = residual.type, residual.shape
    squares.name, squares.type = f"{maker.outputs[0].name}_squares", ir.TensorType(ir.DataType.FLOAT)
    if node.op_identifier() not in model.functions:
        called = model.functions[maker.op_identifier()]
        function = _adding_function(name, called)
        model.functions[function.identifier()] = flat(function, [called])
    return node


def _adding_function(name: str, called: ir.Function) -> ir.Function:
    ops = Ops()
    residual = ir.Value(name=operators.RESIDUAL)
    inputs = [ir.Value(name=value.name) for value in called.inputs]
    y = ops.op(called.name, *inputs, domain=called.domain, overload=called.overload, **_references(called.attributes))
    total = ops.op("Add", y, residual)
    parts = ops.op("Reshape", ops.cast(total, "float32"), ops.constant([0, 0, -1, operators.SQUARE_COLUMNS], "int64"))
    squares = ops.op("ReduceSumSquare", parts, ops.constant([3], "int64"), keepdims=0)
    return _function(name, ops, [residual, *inputs], [total, squares], called.overload, called.attributes)


def _norm(model: ir.Model, node: ir.Node, adding: ir.Node) -> ir.Node:
    """Make the node that reads the norm of a sum whose squares are given, or gives the norm alone."""
    alone = node.op_type == operators.ADD_NORM
    form = "" if alone else form_of(node)
    norm = ir.Node(
        operators.FUNCTION_DOMAIN,
        operators.RMS_NORM if alone else operators.RMS_ROW_LINEAR + form,
        [*adding.outputs, *node.inputs[2:]],
        node.attributes.values(),
        overload=node.overload,
        num_outputs=1,
    )
    if norm.op_identifier() not in model.functions:
        called = (
            None if alone else model.functions[operators.FUNCTION_DOMAIN, operators.ROW_LINEAR + form, node.overload]
        )
        function = _norm_function(norm.op_type, form, called)
        model.functions[function.identifier()] = function if called is None else flat(function, [called])
    return norm


def _norm_function(name: str, form: str, called: ir.Function | None) -> ir.Function:
    """Define the norm, and what is called with it, if anything is."""
    ops = Ops()
    x, squares, norm_weight = taken = [ir.Value(name=each) for each in operators.RMS_INPUTS]
    parts = ops.op("ReduceMean", squares, ops.constant([-1], "int64"), keepdims=1)
    mean = ops.op("Div", parts, ops.constant(float(operators.SQUARE_COLUMNS), "float32"))
    epsilon = ops.op("Constant", value_float=ir.RefAttr("value_float", "epsilon", ir.AttributeType.FLOAT))
    scale = ops.op("Reciprocal", ops.op("Sqrt", ops.op("Add", mean, epsilon)))
    scaled = ops.op("Mul", ops.cast(x, "float32"), scale)
    normed = ops.op("CastLike", ops.op("Mul", ops.cast(norm_weight, "float32"), scaled), x)
    attributes: dict[str, ir.Attr] = {"epsilon": ir.AttrFloat32("epsilon", 1e-6), EARLY: ir.AttrInt64(EARLY, 0)}
    if called is None:
        return _function(name, ops, taken, [normed], "", attributes)
    rows = [ir.Value(name=value.name) for value in called.inputs[1:]]
    attributes |= {each: called.attributes[each] for each in OWN[form]}
    references = _references({each: attributes[each] for each in (*OWN[form], EARLY)})
    y = ops.op(called.name, normed, *rows, domain=called.domain, overload=called.overload, **references)
    return _function(name, ops, [*taken, *rows], [y], called.overload, attributes)


def _references(attributes: Mapping[str, ir.Attr]) -> dict[str, ir.Attr]:
    return {name: ir.RefAttr(name, name, attribute.type) for name, attribute in attributes.items()}


def _function(
    name: str,
    ops: Ops,
    inputs: list[ir.Value],
    outputs: list[ir.Value],
    overload: str,
    attributes: Mapping[str, ir.Attr],
) -> ir.Function:
    for number, value in enumerate(outputs):
        value.name = f"output_{number}"
    imports = {"": OPSET, operators.FUNCTION_DOMAIN: 1}
    graph = ir.Graph(inputs, outputs, nodes=ops.tape.nodes, opset_imports=imports, name=name)
    return ir.Function(operators.FUNCTION_DOMAIN, name, overload, graph=graph, attributes=list(attributes.values()))
