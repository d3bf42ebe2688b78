"""The decode graph: computes only the neurons of a prompt mask."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tda_export.graph import contract, kv_formats
from tda_export.graph.attention import attention_lengths
from tda_export.graph.attention_function import StepGraphBuilder
from tda_export.graph.decoder import GraphBuilder, model_shape
from tda_export.graph.ffn import FfnForm, activate, ffn_form, indexed_ffn, indexed_ffn_function
from tda_export.graph.greedy import greedy_token_function, greedy_tokens
from tda_export.graph.linear import FunctionGraphBuilder, linear_functions
from tda_export.graph.method import Method
from tda_export.graph.operators import FfnInput
from tda_export.graph.ops import to_numpy
from tda_export.graph.weights_file import WeightTable
from tda_export.models.spec import DecoderSpec


def build_decode(
    spec: DecoderSpec,
    weights: WeightTable,
    dtype: str,
    method: Method,
    token_thresholds: np.ndarray | None = None,
    *,
    kv: str = kv_formats.KV_FLOAT,
    explicit: bool = False,
    ffn_inputs: bool = False,
    counted: bool = False,
) -> ir.Model:
    """Build the graph that computes only the neurons in `mask_indices`; by default all neurons that pass the token
    thresholds.

    Args:
        spec: The architecture.
        weights: The tensors of weights.bin.
        dtype: A value of `contract.DTYPES`.
        method: The method. With `two_levels` the graph takes token thresholds.
        token_thresholds: float32 [L], the default of the input with that name; None is off.
        kv: How keys and values are stored, one of `kv_formats.KV_FORMATS`.
        explicit: Give no input a default.
        ffn_inputs: Add the input of each layer's FFN to the outputs, for measurements.
        counted: Add the number of neurons that each layer computes for each token, int64 [L, S], to the outputs; for
            two-level methods.

    Returns:
        The model with the inputs and outputs of `contract.decode_inputs` and `contract.decode_outputs`.
    """
    shape, form = model_shape(spec, dtype, kv), ffn_form(spec, two_levels=method.two_levels)
    half = dtype != "float32"
    declared_inputs = contract.decode_inputs(shape, two_levels=method.two_levels, explicit=explicit)
    graph = (FunctionGraphBuilder if half else StepGraphBuilder)(spec, weights, dtype, declared_inputs, kv)
    inputs, outputs = graph.inputs, graph.outputs
    kept: list[ir.Value] = []

    def ffn(layer: int, x: ir.Value) -> tuple[ir.Value, ir.Value | None]:
        outputs[contract.ffn_input(layer)] = x
        arguments = {FfnInput.X: x, FfnInput.MASK_INDICES: inputs[contract.mask_indices(layer)]}
        for part in spec.ffn_parts:
            arguments[FfnInput.weight(part)] = graph.weight(contract.ffn_weight(layer, part))
            if spec.ffn_bias:
                arguments[FfnInput.bias(part)] = graph.weight(contract.ffn_bias(layer, part))
        if method.two_levels:
            arguments[FfnInput.NEURON_SCALE] = graph.weight(contract.neuron_scale(layer))
            arguments[FfnInput.TOKEN_THRESHOLDS] = inputs[contract.TOKEN_THRESHOLDS]
        if counted:
            kept.append(_survivors(graph, form, layer, arguments))
        return indexed_ffn(graph.ops, form, layer, arguments), inputs[contract.tail_mean(layer)]

    hidden = graph.layers(attention_lengths(graph.ops, inputs[contract.ATTENTION_MASK]), ffn)
    outputs[contract.LOGITS] = graph.logits(hidden)
    outputs[contract.GREEDY_TOKENS] = greedy_tokens(graph.ops, outputs[contract.LOGITS])
    every, nothing = np.arange(spec.ffn_size, dtype=np.int32), to_numpy(np.zeros(spec.hidden_size), dtype)
    defaults = {contract.mask_indices(i): every for i in range(spec.num_layers)} | {
        contract.tail_mean(i): nothing for i in range(spec.num_layers)
    }
    if method.two_levels:
        off = np.zeros(spec.num_layers, np.float32)
        defaults[contract.TOKEN_THRESHOLDS] = off if token_thresholds is None else np.asarray(token_thresholds, "f4")
    if counted:
        outputs[contract.KEPT_NEURONS] = graph.ops.op("Concat", *kept, axis=0)  # [L, S]
    functions = [indexed_ffn_function(form, down_bias=spec.ffn_bias), greedy_token_function()]
    functions += graph.attention_functions()
    if half:
        functions += linear_functions(spec.norm)
    declared = contract.decode_outputs(shape, ffn_inputs=ffn_inputs, counted=counted)
    return graph.model("decode", declared, {} if explicit else defaults, functions)


def _survivors(graph: GraphBuilder, form: FfnForm, layer: int, arguments: dict[str, ir.Value]) -> ir.Value:
    """Count the neurons of the prompt mask whose down rows each token reads, int64 [1, S], from the first rows of all
    neurons.

    These neurons reach the threshold and have a nonzero activation.
    """
    ops, size = graph.ops, graph.spec.ffn_size
    first = ops.transposed_matmul(arguments[FfnInput.X], arguments[FfnInput.weight(form.first_part)])  # [1, S, F]
    if form.bias:
        first = ops.op("Add", first, arguments[FfnInput.bias(form.first_part)])
    activated = ops.cast(activate(ops, form.activation, first), "float32")
    estimate = ops.op("Mul", ops.op("Abs", activated), arguments[FfnInput.NEURON_SCALE])
    threshold = ops.op("Gather", arguments[FfnInput.TOKEN_THRESHOLDS], ops.constant(layer, "int64"), axis=0)
    above = ops.op("GreaterOrEqual", estimate, threshold)  # bool [1, S, F]
    passes = ops.op("And", above, ops.op("Greater", ops.op("Abs", activated), ops.constant(0.0, "float32")))
    indices = arguments[FfnInput.MASK_INDICES]
    padded = ops.op("Less", indices, ops.constant([0], "int32"))
    places = ops.op("Where", padded, ops.constant([size], "int32"), indices)  # padding goes behind the last neuron
    ones = ops.op("ConstantOfShape", ops.op("Shape", indices), value=ir.tensor([1.0]))
    marks = ops.op("ScatterElements", ops.constant(np.zeros(size + 1).tolist(), "float32"), places, ones, axis=0)
    inside = ops.op("Slice", marks, ops.constant([0], "int64"), ops.constant([size], "int64"))  # [F]
    kept = ops.op("And", passes, ops.op("Greater", inside, ops.constant(0.5, "float32")))
    return ops.op("ReduceSum", ops.cast(kept, "int64"), ops.constant([2], "int64"), keepdims=0)  # [1, S]
