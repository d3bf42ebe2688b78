"""The decode graph: computes only the neurons of a prompt's mask."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tda_export.graph import contract
from tda_export.graph.attention import attention_lengths
from tda_export.graph.contract import FfnInput
from tda_export.graph.decoder import GraphBuilder, model_shape
from tda_export.graph.ffn import ffn_form, indexed_ffn, indexed_ffn_function
from tda_export.graph.greedy import greedy_token_function, greedy_tokens
from tda_export.graph.linear import HalfGraphBuilder, linear_functions
from tda_export.graph.method import Method
from tda_export.graph.ops import to_numpy
from tda_export.graph.weights_file import WeightTable
from tda_export.models.spec import DecoderSpec


def build_decode(
    spec: DecoderSpec, weights: WeightTable, dtype: str, method: Method, *, ffn_inputs: bool = False
) -> ir.Model:
    """Build the graph that computes only the neurons in `mask_indices`; by default all of them.

    Args:
        spec: The architecture.
        weights: The tensors of weights.bin.
        dtype: A value of `contract.DTYPES`.
        method: With `two_levels` the graph takes token thresholds.
        ffn_inputs: Give the input of each layer's FFN as a further output, for measurements.

    Returns:
        The model with the inputs and outputs of `contract.decode_inputs` and `contract.decode_outputs`.
    """
    shape, form = model_shape(spec, dtype), ffn_form(spec, two_levels=method.two_levels)
    half = dtype != "float32"
    declared_inputs = contract.decode_inputs(shape, two_levels=method.two_levels)
    graph = (HalfGraphBuilder if half else GraphBuilder)(spec, weights, dtype, declared_inputs)
    inputs, outputs = graph.inputs, graph.outputs

    def ffn(layer: int, x: ir.Value) -> tuple[ir.Value, ir.Value | None]:
        outputs[contract.ffn_input(layer)] = x
        arguments = {FfnInput.X: x, FfnInput.MASK_INDICES: inputs[contract.mask_indices(layer)]}
        for part in contract.FFN_PARTS:
            arguments[FfnInput.weight(part)] = graph.weight(contract.ffn_weight(layer, part))
            if spec.ffn_bias:
                arguments[FfnInput.bias(part)] = graph.weight(contract.ffn_bias(layer, part))
        if method.two_levels:
            arguments[FfnInput.NEURON_SCALE] = graph.weight(contract.neuron_scale(layer))
            arguments[FfnInput.TOKEN_THRESHOLDS] = inputs[contract.TOKEN_THRESHOLDS]
        return indexed_ffn(graph.ops, form, layer, arguments), inputs[contract.tail_mean(layer)]

    hidden = graph.layers(attention_lengths(graph.ops, inputs[contract.ATTENTION_MASK]), ffn)
    outputs[contract.LOGITS] = graph.logits(hidden)
    outputs[contract.GREEDY_TOKENS] = greedy_tokens(graph.ops, outputs[contract.LOGITS])
    every, nothing = np.arange(spec.ffn_size, dtype=np.int32), to_numpy(np.zeros(spec.hidden_size), dtype)
    defaults = {contract.mask_indices(i): every for i in range(spec.num_layers)} | {
        contract.tail_mean(i): nothing for i in range(spec.num_layers)
    }
    if method.two_levels:
        defaults[contract.TOKEN_THRESHOLDS] = np.zeros(spec.num_layers, np.float32)
    functions = [indexed_ffn_function(form, down_bias=spec.ffn_bias), greedy_token_function()]
    if half:
        functions += linear_functions()
    declared = contract.decode_outputs(shape, ffn_inputs=ffn_inputs)
    return graph.model("decode", declared, defaults, functions)
