"""Neuron statistics and mask selection, inside the prefill graph.

All of it is float32 whatever the model's dtype: squared relative magnitudes underflow float16.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from tda_export.graph import contract
from tda_export.graph.method import Method
from tda_export.graph.ops import Ops
from tda_export.graph.weights_file import WeightTable
from tda_export.models.spec import DecoderSpec

TINY = 1e-30  # guards divisions whose numerator is zero too


@dataclass(frozen=True)
class RunningStats:
    """Inputs and shared values of the running statistics."""

    past_weight: ir.Value  # float32 [1]
    decay: ir.Value  # float32 [1]
    counted: ir.Value  # bool [S]
    counted_row: ir.Value  # float32 [1, S]: 1 where counted
    present_weight: ir.Value  # float32 [1]


def running_stats(ops: Ops, counted: ir.Value, past_weight: ir.Value, decay: ir.Value) -> RunningStats:
    """Compute `present_stats_weight` = decay * past weight + number of counted tokens, and what the layers share."""
    counted_float = ops.cast(counted, "float32")  # [S]
    number = ops.op("ReduceSum", counted_float, ops.constant([0], "int64"), keepdims=1)  # [1]
    present = ops.op("Add", ops.op("Mul", past_weight, decay), number)
    row = ops.op("Unsqueeze", counted_float, ops.constant([0], "int64"))  # [1, S]
    return RunningStats(past_weight, decay, counted, row, present)


def layer_stats(
    ops: Ops,
    method: Method,
    weights: WeightTable,
    layer: int,
    h: ir.Value,
    past_stats: ir.Value,
    stats: RunningStats,
) -> ir.Value:
    """Compute `present_neuron_stats` [2, F] = decay * past + the sums over this call's counted tokens.

    Row 0 sums r_i(t)^2 = h_i^2 c_i / sum_j h_j^2 c_j with c_i = ||W_down[:, i]||^2 (magnitude) or 1 (activation);
    row 1 sums h_i(t). Both sums are one product of a row of token weights with a matrix, so nothing of size
    [S, F] but h and h^2 is ever stored.
    """
    activations = ops.op("Squeeze", ops.cast(h, "float32"), ops.constant([0], "int64"))  # [S, F]
    squares = ops.op("Mul", activations, activations)  # [S, F]
    if method.statistic == "magnitude":
        column_weights = ops.weight(weights[contract.down_squared_norms(layer)])  # [F]
        column = ops.op("Unsqueeze", column_weights, ops.constant([1], "int64"))  # [F, 1]
        norms = ops.op("Squeeze", ops.op("MatMul", squares, column), ops.constant([1], "int64"))  # [S]
    else:
        norms = ops.op("ReduceSum", squares, ops.constant([1], "int64"), keepdims=0)  # [S]
    usable = ops.op("And", stats.counted, ops.op("Greater", norms, ops.constant(0.0, "float32")))  # [S]
    # Where, not a product: an uncounted or all-zero token would turn 1/0 or inf * 0 into NaN.
    safe = ops.op("Where", usable, norms, ops.constant(1.0, "float32"))
    token_weights = ops.op("Where", usable, ops.op("Reciprocal", safe), ops.constant(0.0, "float32"))  # [S]
    scores = ops.op("MatMul", ops.op("Unsqueeze", token_weights, ops.constant([0], "int64")), squares)  # [1, F]
    if method.statistic == "magnitude":
        scores = ops.op("Mul", scores, column_weights)
    sums = ops.op("MatMul", stats.counted_row, activations)  # [1, F]
    new = ops.op("Concat", scores, sums, axis=0)  # [2, F]
    return ops.op("Add", ops.op("Mul", past_stats, stats.decay), new)


def select_mask(
    ops: Ops,
    spec: DecoderSpec,
    method: Method,
    layer: int,
    present_stats: ir.Value,
    weight: ir.Value,
    thresholds: ir.Value,
) -> tuple[ir.Value, ir.Value]:
    """Choose the mask from the statistics.

    Without any counted token (weight 0: a one-token prompt without a prior) every neuron is kept.

    Returns:
        `present_mask_indices` int32 [K], ascending, and the mask itself as bool [F].
    """
    empty = ops.op("LessOrEqual", weight, ops.constant([0.0], "float32"))  # [1]
    row = ops.op("Gather", present_stats, ops.constant(contract.SCORE_ROW, "int64"), axis=0)  # [F]
    safe_weight = ops.op("Max", weight, ops.constant([TINY], "float32"))
    scores = ops.op("Sqrt", ops.op("Div", row, safe_weight))  # [F]
    if method.selection == "threshold":
        threshold = ops.op("Gather", thresholds, ops.constant(layer, "int64"), axis=0)  # scalar
        keep = ops.op("Or", ops.op("GreaterOrEqual", scores, threshold), empty)  # [F]
    else:
        _, best = ops.multi(
            "TopK", scores, ops.constant([method.kept(spec.ffn_size)], "int64"), outputs=(True, True), sorted=0
        )  # int64 [K]
        none = ops.op("ConstantOfShape", ops.constant([spec.ffn_size], "int64"), value=ir.tensor([0.0]))
        ones = ops.op("ConstantOfShape", ops.constant([method.kept(spec.ffn_size)], "int64"), value=ir.tensor([1.0]))
        chosen = ops.op("ScatterElements", none, best, ones, axis=0)  # float32 [F]
        keep = ops.op("Or", ops.op("Greater", chosen, ops.constant(0.0, "float32")), empty)
    indices = ops.op("Squeeze", ops.op("NonZero", keep), ops.constant([0], "int64"))  # int64 [K]
    return ops.cast(indices, "int32"), keep


def tail_mean(
    ops: Ops,
    spec: DecoderSpec,
    method: Method,
    weights: WeightTable,
    layer: int,
    present_stats: ir.Value,
    weight: ir.Value,
    keep: ir.Value,
    dtype: str,
) -> ir.Value:
    """Compute `present_tail_mean` [M] = W_down[:, D] · mean(h_D) over the dropped neurons D, or zeros."""
    if method.tail == "zero":
        zeros = ops.op("ConstantOfShape", ops.constant([spec.hidden_size], "int64"), value=ir.tensor([0.0]))
        return ops.cast(zeros, dtype)
    row = ops.op("Gather", present_stats, ops.constant([contract.ACTIVATION_ROW], "int64"), axis=0)  # [1, F]
    means = ops.op("Div", row, ops.op("Max", weight, ops.constant([TINY], "float32")))
    dropped = ops.op("Where", keep, ops.constant(0.0, "float32"), means)  # [1, F]
    product = ops.op("MatMul", ops.cast(dropped, dtype), ops.weight(weights[contract.ffn_weight(layer, "down")]))
    return ops.op("Squeeze", product, ops.constant([0], "int64"))  # [M]
