"""Products with matrices of integer formats, as functions that native kernels may replace.

`tda::RowLinear4` and `RowLinear8` multiply by an input-major matrix and read its rows as `RowLinear` does. `Linear4`
and `Linear8` multiply by an output-major matrix and read every row. Their bodies use standard operators and ONNX
Runtime's own. Only rows that some token needs are de-quantised, and a de-quantised matrix lives no longer than its
product.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx_ir as ir

from tda_export.graph import operators
from tda_export.graph.operators import IntegerInput
from tda_export.graph.ops import MICROSOFT, OPSET, Ops
from tda_export.graph.row_linear import WITH_BIAS, dropped_rows
from tda_export.weights.formats import IntegerFormat
from tda_export.weights.matrix import Matrix

COLUMNS, GROUP, EARLY = "columns", "group", "early"


def integer_row_linear(
    ops: Ops,
    matrix: Matrix,
    x: ir.Value,
    stored: list[ir.Value],
    row_price: ir.Value,
    price: ir.Value,
    bias: ir.Value | None = None,
    *,
    early: bool = False,
) -> ir.Value:
    """Add the node that multiplies x [.., in] by an input-major matrix; see `row_linear.row_linear`.

    `stored` are the matrix's tensors.
    """
    return ops.op(
        operators.row_linear_of(matrix.format.bits),
        *(x, *stored, row_price, price),
        *([] if bias is None else [bias]),
        domain=operators.FUNCTION_DOMAIN,
        overload="" if bias is None else WITH_BIAS,
        columns=matrix.columns,
        group=group_of(matrix),
        early=int(early),
    )


def integer_linear(ops: Ops, matrix: Matrix, x: ir.Value, stored: list[ir.Value]) -> ir.Value:
    """Add the node that multiplies x [.., in] by an output-major matrix, whose tensors are `stored`."""
    return ops.op(
        operators.linear_of(matrix.format.bits),
        *(x, *stored),
        domain=operators.FUNCTION_DOMAIN,
        columns=matrix.columns,
        group=group_of(matrix),
        early=1,
    )


def integer_rows(ops: Ops, matrix: Matrix, indices: ir.Value, stored: list[ir.Value], dtype: str) -> ir.Value:
    """De-quantise the rows with indices [1, S] of a matrix: [1, S, columns] of `dtype`."""
    weight, scales, zero_points = stored
    bits = matrix.format.bits
    rows = _gathered(ops, bits, weight, ops.cast(scales, dtype), zero_points, indices, group_of(matrix))
    padded = 8 // bits * matrix.tensors[0].shape[1]
    rows = ops.op("Reshape", rows, ops.constant([0, 0, padded], "int64"))
    if padded == matrix.columns:
        return rows
    return ops.op("Slice", rows, *(ops.constant([number], "int64") for number in (0, matrix.columns, -1)))


def integer_functions(matrices: Iterable[Matrix]) -> list[ir.Function]:
    """Define the functions that these matrices need. Their bodies run in any ONNX Runtime without native kernels."""
    used = {(matrix.format.bits, matrix.major) for matrix in matrices if not matrix.format.is_float}
    functions = []
    for bits in operators.INTEGER_BITS:
        if (bits, "input") in used:
            functions += [_row_linear_function(bits, biased=biased) for biased in (False, True)]
        if (bits, "output") in used:
            functions.append(_linear_function(bits))
    return functions


def group_of(matrix: Matrix) -> int:
    """Return the number of elements of a group of an integer matrix."""
    assert isinstance(matrix.format, IntegerFormat)
    return matrix.format.group


def _row_linear_function(bits: int, *, biased: bool) -> ir.Function:
    ops = Ops()
    inputs = {name: ir.Value(name=name) for name in operators.INTEGER_ROW_LINEAR_INPUTS[: 7 if biased else 6]}
    x = inputs[IntegerInput.X]
    drop = dropped_rows(ops, x, inputs[IntegerInput.ROW_PRICE], inputs[IntegerInput.PRICE])
    zero = ops.op("CastLike", ops.constant(0.0, "float32"), x)
    kept = ops.op("Where", drop, zero, x)  # [1, S, in]
    by_token = ops.cast(ops.op("Not", drop), "int32")
    some = ops.op("ReduceMax", by_token, ops.constant([0, 1], "int64"), keepdims=0)  # int32 [in]
    rows = ops.op("Squeeze", ops.op("NonZero", some), ops.constant([0], "int64"))  # int64 [K]
    weight = _function_rows(ops, bits, inputs, rows, x)
    y = ops.matmul(ops.op("Gather", kept, rows, axis=2), weight)
    if bits < 8:
        y = ops.op("Slice", y, ops.constant([0], "int64"), _columns(ops), ops.constant([-1], "int64"))
    if biased:
        y = ops.op("Add", y, inputs[IntegerInput.BIAS])
    return _function(operators.row_linear_of(bits), WITH_BIAS if biased else "", ops, list(inputs.values()), y)


def _linear_function(bits: int) -> ir.Function:
    ops = Ops()
    inputs = {name: ir.Value(name=name) for name in operators.INTEGER_LINEAR_INPUTS}
    x, weight = inputs[IntegerInput.X], inputs[IntegerInput.WEIGHT]
    count = ops.op("Squeeze", ops.op("Shape", weight, start=0, end=1), ops.constant([0], "int64"))
    every = ops.op("Range", ops.constant(0, "int64"), count, ops.constant(1, "int64"))
    rows = _function_rows(ops, bits, inputs, every, x)  # [out, in]
    if bits < 8:
        rows = ops.op("Slice", rows, ops.constant([0], "int64"), _columns(ops), ops.constant([1], "int64"))
    return _function(operators.linear_of(bits), "", ops, list(inputs.values()), ops.transposed_matmul(x, rows))


def _function_rows(ops: Ops, bits: int, inputs: dict[str, ir.Value], rows: ir.Value, like: ir.Value) -> ir.Value:
    scales = ops.op("CastLike", inputs[IntegerInput.SCALES], like)
    group, weight = ir.RefAttr("block_size", GROUP, ir.AttributeType.INT), inputs[IntegerInput.WEIGHT]
    gathered = _gathered(ops, bits, weight, scales, inputs[IntegerInput.ZERO_POINTS], rows, group)
    if bits == 8:
        return gathered
    # ONNX Runtime before 1.31 infers wrong shapes; this one is right.
    padded = ops.op("Mul", ops.op("Shape", weight, start=1, end=2), ops.constant([8 // bits], "int64"))
    return ops.op("Reshape", gathered, ops.op("Concat", ops.constant([-1], "int64"), padded, axis=0))


def _gathered(
    ops: Ops,
    bits: int,
    weight: ir.Value,
    scales: ir.Value,
    zero_points: ir.Value,
    rows: ir.Value,
    group: Any,  # an int, or a reference to an attribute
) -> ir.Value:
    """De-quantise some rows. Rows with an odd number of four-bit codes get one extra element."""
    return ops.op(
        "GatherBlockQuantized",
        weight,
        rows,
        scales,
        zero_points,
        domain=MICROSOFT,
        bits=bits,
        block_size=group,
        gather_axis=0,
        quantize_axis=1,
    )


def _columns(ops: Ops) -> ir.Value:
    """Return the attribute `columns` as int64 [1]."""
    number = ops.op("Constant", value_int=ir.RefAttr("value_int", COLUMNS, ir.AttributeType.INT))
    return ops.op("Unsqueeze", number, ops.constant([0], "int64"))


def _function(name: str, overload: str, ops: Ops, inputs: list[ir.Value], y: ir.Value) -> ir.Function:
    y.name = "y"
    imports = {"": OPSET, MICROSOFT: 1}
    graph = ir.Graph(inputs, [y], nodes=ops.tape.nodes, opset_imports=imports, name=name)
    attributes = [ir.AttrInt64(COLUMNS, 0), ir.AttrInt64(GROUP, 0), ir.AttrInt64(EARLY, 0)]
    return ir.Function(operators.FUNCTION_DOMAIN, name, overload, graph=graph, attributes=attributes)
