"""Neuron statistics and selection of the prompt mask, inside the prefill graph.

All of it is float32 for every dtype of the model, since squared relative magnitudes underflow float16. Each step is a
model-local function, so that a native kernel may replace it.
"""

from __future__ import annotations

import onnx_ir as ir

from tda_export.graph import contract, operators
from tda_export.graph.decoder import GraphBuilder
from tda_export.graph.method import Method
from tda_export.graph.ops import OPSET, Ops

TINY = 1e-30  # guards divisions whose numerator is zero too


def present_stats_weight(ops: Ops, counted: ir.Value, past_weight: ir.Value, decay: ir.Value) -> ir.Value:
    """Compute `present_stats_weight` [1] = decay * past weight + number of counted tokens (bool [S])."""
    number = ops.op("ReduceSum", ops.cast(counted, "float32"), ops.constant([0], "int64"), keepdims=1)  # [1]
    return ops.op("Add", ops.op("Mul", past_weight, decay), number)


def neuron_stats(
    graph: GraphBuilder,
    method: Method,
    layer: int,
    h: ir.Value,
    counted: ir.Value,
    past_stats: ir.Value,
    decay: ir.Value,
) -> ir.Value:
    """Add the node that computes `present_neuron_stats` [2, F] from h [1, S, F] and counted, bool [S]."""
    weights = [graph.weight(contract.down_squared_norms(layer))] if method.statistic == "magnitude" else []
    return graph.ops.op(
        operators.NEURON_STATS, h, counted, past_stats, decay, *weights, domain=operators.FUNCTION_DOMAIN
    )


def mask_and_tail(
    graph: GraphBuilder, method: Method, layer: int, stats: ir.Value, weight: ir.Value, thresholds: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Add the nodes that choose the prompt mask from the statistics and average the neurons outside it.

    Returns:
        `present_mask_indices` int32 [K], and `present_tail_mean` [M] in the model's dtype.
    """
    ops = graph.ops
    if method.selection == "threshold":
        indices, keep = ops.multi(
            operators.SELECT_MASK,
            stats,
            weight,
            thresholds,
            outputs=(True, True),
            domain=operators.FUNCTION_DOMAIN,
            layer=layer,
        )
    else:
        keep = _best_neurons(ops, stats, weight, graph.spec.ffn_size, method.kept(graph.spec.ffn_size))
        indices = _indices(ops, keep)
    if method.tail == "zero":
        zeros = ops.op("ConstantOfShape", ops.constant([graph.spec.hidden_size], "int64"), value=ir.tensor([0.0]))
        return indices, zeros if graph.dtype == "float32" else ops.cast(zeros, graph.dtype)
    down = graph.weight(contract.ffn_weight(layer, "down"))
    return indices, ops.op(operators.TAIL_MEAN, stats, weight, keep, down, domain=operators.FUNCTION_DOMAIN)


def statistics_functions(method: Method) -> list[ir.Function]:
    """Return the functions that a method's prefill graph calls."""
    functions = [neuron_stats_function(method)]
    if method.selection == "threshold":
        functions.append(select_mask_function())
    if method.tail == "mean":
        functions.append(tail_mean_function())
    return functions


def neuron_stats_function(method: Method) -> ir.Function:
    """Define `tda::NeuronStats`: present stats [2, F] = decay * past + the sums over this call's counted tokens.

    Row 0 sums r_i(t)^2 = h_i^2 c_i / sum_j h_j^2 c_j with c_i = ||W_down[:, i]||^2 (magnitude) or 1 (activation);
    row 1 sums h_i(t). Each sum is a product of a row of token weights with a matrix, so only h and h^2 of size [S, F]
    are ever stored. Inputs: h [1, S, F], counted bool [S], past_stats [2, F], decay [1], and for the magnitude
    squared_norms [F].
    """
    ops = Ops()
    names = ("h", "counted", "past_stats", "decay", "squared_norms")
    inputs = [ir.Value(name=name) for name in names[: 5 if method.statistic == "magnitude" else 4]]
    h, counted, past_stats, decay = inputs[:4]
    activations = ops.op("Squeeze", ops.cast(h, "float32"), ops.constant([0], "int64"))  # [S, F]
    squares = ops.op("Mul", activations, activations)  # [S, F]
    if method.statistic == "magnitude":
        column = ops.op("Unsqueeze", inputs[4], ops.constant([1], "int64"))  # [F, 1]
        norms = ops.op("Squeeze", ops.op("MatMul", squares, column), ops.constant([1], "int64"))  # [S]
    else:
        norms = ops.op("ReduceSum", squares, ops.constant([1], "int64"), keepdims=0)  # [S]
    usable = ops.op("And", counted, ops.op("Greater", norms, ops.constant(0.0, "float32")))  # [S]
    # Where instead of a product: for an uncounted or all-zero token, 1/0 or inf * 0 would give NaN.
    safe = ops.op("Where", usable, norms, ops.constant(1.0, "float32"))
    token_weights = ops.op("Where", usable, ops.op("Reciprocal", safe), ops.constant(0.0, "float32"))  # [S]
    scores = ops.op("MatMul", ops.op("Unsqueeze", token_weights, ops.constant([0], "int64")), squares)  # [1, F]
    if method.statistic == "magnitude":
        scores = ops.op("Mul", scores, inputs[4])
    counted_row = ops.op("Unsqueeze", ops.cast(counted, "float32"), ops.constant([0], "int64"))  # [1, S]
    sums = ops.op("MatMul", counted_row, activations)  # [1, F]
    new = ops.op("Concat", scores, sums, axis=0)  # [2, F]
    present = ops.op("Add", ops.op("Mul", past_stats, decay), new)
    return _function(operators.NEURON_STATS, ops, inputs, {"present_stats": present})


def select_mask_function() -> ir.Function:
    """Define `tda::SelectMask`: keep the neurons whose score reaches their layer's threshold.

    Without a counted token (weight 0: a one-token prompt without a prior) every neuron is kept. Inputs: stats [2, F],
    weight [1], thresholds [L]; attribute `layer`. Outputs: the indices, int32 [K], ascending, and the mask itself as
    bool [F].
    """
    ops = Ops()
    stats, weight, thresholds = inputs = [ir.Value(name=name) for name in ("stats", "weight", "thresholds")]
    layer = ops.op("Constant", value_int=ir.RefAttr("value_int", "layer", ir.AttributeType.INT))
    threshold = ops.op("Gather", thresholds, layer, axis=0)  # scalar
    reaches = ops.op("GreaterOrEqual", _scores(ops, stats, weight), threshold)
    keep = ops.op("Or", reaches, _without_tokens(ops, weight))  # [F]
    outputs = {"indices": _indices(ops, keep), "keep": keep}
    return _function(operators.SELECT_MASK, ops, inputs, outputs, attributes=[ir.AttrInt64("layer", 0)])


def tail_mean_function() -> ir.Function:
    """Define `tda::TailMean`: W_down[:, D] · mean(h_D) over the dropped neurons D.

    Inputs: stats [2, F], weight [1], keep bool [F], w_down [F, M]. Output: [M], in the dtype of w_down.
    """
    ops = Ops()
    stats, weight, keep, down = inputs = [ir.Value(name=name) for name in ("stats", "weight", "keep", "w_down")]
    row = ops.op("Gather", stats, ops.constant([contract.ACTIVATION_ROW], "int64"), axis=0)  # [1, F]
    means = ops.op("Div", row, ops.op("Max", weight, ops.constant([TINY], "float32")))
    dropped = ops.op("Where", keep, ops.constant(0.0, "float32"), means)  # [1, F]
    product = ops.op("MatMul", ops.op("CastLike", dropped, down), down)  # [1, M]
    tail = ops.op("Squeeze", product, ops.constant([0], "int64"))
    return _function(operators.TAIL_MEAN, ops, inputs, {"tail": tail})


def _scores(ops: Ops, stats: ir.Value, weight: ir.Value) -> ir.Value:
    row = ops.op("Gather", stats, ops.constant(contract.SCORE_ROW, "int64"), axis=0)  # [F]
    safe_weight = ops.op("Max", weight, ops.constant([TINY], "float32"))
    return ops.op("Sqrt", ops.op("Div", row, safe_weight))  # [F]


def _without_tokens(ops: Ops, weight: ir.Value) -> ir.Value:
    return ops.op("LessOrEqual", weight, ops.constant([0.0], "float32"))  # bool [1]


def _indices(ops: Ops, keep: ir.Value) -> ir.Value:
    """List the neurons of a mask, bool [F]: int32 [K]."""
    return ops.cast(ops.op("Squeeze", ops.op("NonZero", keep), ops.constant([0], "int64")), "int32")


def _best_neurons(ops: Ops, stats: ir.Value, weight: ir.Value, neurons: int, kept: int) -> ir.Value:
    """Keep the neurons of the largest scores: bool [F]."""
    number = ops.constant([kept], "int64")
    _, best = ops.multi("TopK", _scores(ops, stats, weight), number, outputs=(True, True), sorted=0)  # int64 [K]
    none = ops.op("ConstantOfShape", ops.constant([neurons], "int64"), value=ir.tensor([0.0]))
    ones = ops.op("ConstantOfShape", number, value=ir.tensor([1.0]))
    chosen = ops.op("ScatterElements", none, best, ones, axis=0)  # float32 [F]
    return ops.op("Or", ops.op("Greater", chosen, ops.constant(0.0, "float32")), _without_tokens(ops, weight))


def _function(
    name: str, ops: Ops, inputs: list[ir.Value], outputs: dict[str, ir.Value], attributes: list[ir.Attr] | None = None
) -> ir.Function:
    for output_name, value in outputs.items():
        value.name = output_name
    graph = ir.Graph(inputs, list(outputs.values()), nodes=ops.tape.nodes, opset_imports={"": OPSET}, name=name)
    return ir.Function(operators.FUNCTION_DOMAIN, name, graph=graph, attributes=attributes or [])
