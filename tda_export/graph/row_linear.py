"""`tda::RowLinear`: a product that reads row i of an input-major matrix only where the row is worth its bytes.

Row i is dropped for a token where x_i² row_price_i < price. Both sides are compared in float32, from the same x as in
the product. The comparison is *Less*, not the negation of its opposite, so that a NaN in x reaches the output, and a
NaN price reads every row.
"""

from __future__ import annotations

import onnx_ir as ir

from tda_export.graph import operators
from tda_export.graph.ops import OPSET, Ops

WITH_BIAS = "bias"  # the function's overload: an absent input cannot reach Add


def row_linear(
    ops: Ops,
    x: ir.Value,
    weight: ir.Value,
    row_price: ir.Value,
    price: ir.Value,
    bias: ir.Value | None = None,
    *,
    early: bool = False,
) -> ir.Value:
    """Add the node that multiplies x [.., in] by weight [in, out], given float32 row_price [in] and price [1].

    `early` says that the price is computed before the previous node begins, so that a kernel may read it early.
    """
    return ops.op(
        operators.ROW_LINEAR,
        *(x, weight, row_price, price),
        *([] if bias is None else [bias]),
        domain=operators.FUNCTION_DOMAIN,
        overload="" if bias is None else WITH_BIAS,
        early=int(early),
    )


def dropped_rows(ops: Ops, x: ir.Value, row_price: ir.Value, price: ir.Value) -> ir.Value:
    """Return which rows each token drops, bool [.., in]."""
    x32 = ops.cast(x, "float32")
    return ops.op("Less", ops.op("Mul", ops.op("Mul", x32, x32), row_price), price)


def row_linear_functions() -> list[ir.Function]:
    """Define `tda::RowLinear` without and with a bias. The bodies run in any ONNX Runtime without a native kernel."""
    return [_row_linear_function(biased=False), _row_linear_function(biased=True)]


def _row_linear_function(*, biased: bool) -> ir.Function:
    ops = Ops()
    inputs = [ir.Value(name=name) for name in operators.ROW_LINEAR_INPUTS[: 5 if biased else 4]]
    x, weight, row_price, price, *bias = inputs
    zero = ops.op("CastLike", ops.constant(0.0, "float32"), x)
    y = ops.matmul(ops.op("Where", dropped_rows(ops, x, row_price, price), zero, x), weight)
    if bias:
        y = ops.op("Add", y, *bias)
    y.name = "y"
    graph = ir.Graph(inputs, [y], nodes=ops.tape.nodes, opset_imports={"": OPSET}, name=operators.ROW_LINEAR)
    return ir.Function(
        operators.FUNCTION_DOMAIN,
        operators.ROW_LINEAR,
        WITH_BIAS if biased else "",
        graph=graph,
        attributes=[ir.AttrInt64("early", 0)],
    )
