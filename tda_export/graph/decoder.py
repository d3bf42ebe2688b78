"""Assemble the prefill and the decode graph of a decoder from attention and FFN."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

import tda_export
from tda_export.graph import contract
from tda_export.graph.attention import Positions, attention, token_positions
from tda_export.graph.contract import IoTensor, ModelShape
from tda_export.graph.ffn import dense_activations, dense_output, indexed_ffn, indexed_ffn_function
from tda_export.graph.method import Method
from tda_export.graph.ops import IR_VERSION, MICROSOFT, OPSET, Ops, io_value, name_output
from tda_export.graph.statistics import layer_stats, running_stats, select_mask, tail_mean
from tda_export.graph.weights_file import WeightTable
from tda_export.models.spec import DecoderSpec

# A layer's FFN: (layer, normalised x [1, S, M]) -> (y [1, S, M], the bias that the next norm adds, or None)
Ffn = Callable[[int, ir.Value], tuple[ir.Value, ir.Value | None]]


def model_shape(spec: DecoderSpec, dtype: str) -> ModelShape:
    """Return the contract's sizes for a decoder."""
    return ModelShape(
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        hidden_size=spec.hidden_size,
        ffn_size=spec.ffn_size,
        vocab_size=spec.vocab_size,
        max_positions=spec.max_positions,
        dtype=dtype,
    )


def build_prefill(
    spec: DecoderSpec, weights: WeightTable, dtype: str, method: Method, thresholds: np.ndarray
) -> ir.Model:
    """Build the graph that reads a prompt densely and reports the mask.

    Args:
        spec: The architecture.
        weights: The tensors of weights.bin.
        dtype: `float32` or `float16`.
        method: Statistic, selection and tail.
        thresholds: float32 [L], the default of the `thresholds` input.

    Returns:
        The model with the inputs and outputs of `contract.prefill_inputs` and `contract.prefill_outputs`.
    """
    ops, shape = Ops(), model_shape(spec, dtype)
    inputs = {tensor.name: io_value(tensor) for tensor in contract.prefill_inputs(shape)}
    outputs: dict[str, ir.Value] = {}
    positions = token_positions(ops, inputs[contract.INPUT_IDS], inputs[contract.ATTENTION_MASK])
    stats = running_stats(ops, positions.counted, inputs[contract.PAST_STATS_WEIGHT], inputs[contract.STATS_DECAY])
    outputs[contract.PRESENT_STATS_WEIGHT] = stats.present_weight

    def ffn(layer: int, x: ir.Value) -> tuple[ir.Value, ir.Value | None]:
        h = dense_activations(ops, spec, weights, layer, x)
        present = layer_stats(ops, method, weights, layer, h, inputs[contract.past_neuron_stats(layer)], stats)
        indices, keep = select_mask(
            ops, spec, method, layer, present, stats.present_weight, inputs[contract.THRESHOLDS]
        )
        outputs[contract.present_neuron_stats(layer)] = present
        outputs[contract.present_mask_indices(layer)] = indices
        outputs[contract.present_tail_mean(layer)] = tail_mean(
            ops, spec, method, weights, layer, present, stats.present_weight, keep, dtype
        )
        bias = ops.weight(weights[contract.ffn_bias(layer, "down")]) if spec.ffn_bias else None
        return dense_output(ops, weights, layer, h), bias

    hidden = _layers(ops, spec, weights, dtype, inputs, outputs, positions, ffn)
    # Keep the last num_logits positions before any right padding; 0 keeps all.
    number, zero = inputs[contract.NUM_LOGITS], ops.constant([0], "int64")
    every = ops.op("Equal", number, zero)
    start = ops.op("Where", every, zero, ops.op("Max", ops.op("Sub", positions.attended, number), zero))
    end = ops.op("Where", every, ops.constant([np.iinfo(np.int64).max], "int64"), positions.attended)
    last = ops.op("Slice", hidden, start, end, ops.constant([1], "int64"))  # [1, num_logits, M]
    outputs[contract.LOGITS] = _logits(ops, spec, weights, last)
    defaults: dict[str, np.ndarray] = {
        **{contract.past_neuron_stats(i): np.zeros((2, spec.ffn_size), np.float32) for i in range(spec.num_layers)},
        contract.PAST_STATS_WEIGHT: np.zeros(1, np.float32),
        contract.STATS_DECAY: np.ones(1, np.float32),
        contract.THRESHOLDS: np.asarray(thresholds, np.float32),
        contract.NUM_LOGITS: np.ones(1, np.int64),
    }
    return _model("prefill", ops, inputs, outputs, contract.prefill_outputs(shape), defaults, functions=())


def build_decode(spec: DecoderSpec, weights: WeightTable, dtype: str) -> ir.Model:
    """Build the graph that computes only the neurons in `mask_indices`; by default all of them."""
    ops, shape = Ops(), model_shape(spec, dtype)
    inputs = {tensor.name: io_value(tensor) for tensor in contract.decode_inputs(shape)}
    outputs: dict[str, ir.Value] = {}
    positions = token_positions(ops, inputs[contract.INPUT_IDS], inputs[contract.ATTENTION_MASK])

    def ffn(layer: int, x: ir.Value) -> tuple[ir.Value, ir.Value | None]:
        y = indexed_ffn(ops, spec, weights, layer, x, inputs[contract.mask_indices(layer)])
        if spec.ffn_bias:
            y = ops.op("Add", y, ops.weight(weights[contract.ffn_bias(layer, "down")]))
        return y, inputs[contract.tail_mean(layer)]

    hidden = _layers(ops, spec, weights, dtype, inputs, outputs, positions, ffn)
    outputs[contract.LOGITS] = _logits(ops, spec, weights, hidden)
    every, nothing = np.arange(spec.ffn_size, dtype=np.int32), np.zeros(spec.hidden_size, dtype)
    defaults = {contract.mask_indices(i): every for i in range(spec.num_layers)} | {
        contract.tail_mean(i): nothing for i in range(spec.num_layers)
    }
    return _model(
        "decode",
        ops,
        inputs,
        outputs,
        contract.decode_outputs(shape),
        defaults,
        functions=(indexed_ffn_function(spec),),
    )


def _layers(
    ops: Ops,
    spec: DecoderSpec,
    weights: WeightTable,
    dtype: str,
    inputs: dict[str, ir.Value],
    outputs: dict[str, ir.Value],
    positions: Positions,
    ffn: Ffn,
) -> ir.Value:
    """Run embedding, layers and final norm; record the present keys and values; return the hidden state [1, S, M]."""
    residual = ops.op("Gather", ops.weight(weights[contract.EMBEDDING]), inputs[contract.INPUT_IDS])  # [1, S, M]
    normed = _first_norm(ops, spec, weights[contract.attention_norm(0)], residual, dtype)
    for layer in range(spec.num_layers):
        past = inputs[contract.past_key(layer)], inputs[contract.past_value(layer)]
        attended, key, value = attention(ops, spec, weights, layer, normed, past, positions)
        outputs[contract.present_key(layer)], outputs[contract.present_value(layer)] = key, value
        bias = ops.weight(weights[contract.attention_out_bias(layer)]) if spec.attention_out_bias else None
        normed, residual = _add_and_norm(ops, spec, weights[contract.ffn_norm(layer)], attended, residual, bias)
        y, bias = ffn(layer, normed)
        last = layer == spec.num_layers - 1
        norm = contract.FINAL_NORM if last else contract.attention_norm(layer + 1)
        normed, residual = _add_and_norm(ops, spec, weights[norm], y, residual, bias)
    return normed


def _first_norm(ops: Ops, spec: DecoderSpec, weight: ir.ExternalTensor, x: ir.Value, dtype: str) -> ir.Value:
    """RMS norm (arXiv 1910.07467) in standard operators, which ONNX Runtime fuses and the checker knows."""
    x32 = ops.cast(x, "float32") if dtype != "float32" else x
    mean = ops.op("ReduceMean", ops.op("Pow", x32, ops.constant(2.0, "float32")), ops.constant([-1], "int64"))
    root = ops.op("Sqrt", ops.op("Add", mean, ops.constant(spec.norm_epsilon, "float32")))
    normed = ops.op("Div", x32, root)
    return ops.op("Mul", ops.cast(normed, dtype) if dtype != "float32" else normed, ops.weight(weight))


def _add_and_norm(
    ops: Ops, spec: DecoderSpec, weight: ir.ExternalTensor, x: ir.Value, residual: ir.Value, bias: ir.Value | None
) -> tuple[ir.Value, ir.Value]:
    """Return the norm of x + residual + bias, and that sum, in one node."""
    normed, total = ops.multi(
        "SkipSimplifiedLayerNormalization",
        x,
        residual,
        ops.weight(weight),
        *([bias] if bias is not None else []),
        outputs=(True, False, False, True),
        domain=MICROSOFT,
        epsilon=spec.norm_epsilon,
    )
    return normed, total


def _logits(ops: Ops, spec: DecoderSpec, weights: WeightTable, hidden: ir.Value) -> ir.Value:
    head = weights[contract.EMBEDDING if spec.tied_head else contract.HEAD]  # [V, M]
    return ops.cast(ops.transposed_matmul(hidden, ops.weight(head)), "float32")


def _model(
    name: str,
    ops: Ops,
    inputs: dict[str, ir.Value],
    outputs: dict[str, ir.Value],
    declared: list[IoTensor],
    defaults: dict[str, np.ndarray],
    functions: tuple[ir.Function, ...],
) -> ir.Model:
    for input_name, array in defaults.items():
        value = inputs[input_name]
        value.const_value = ir.tensor(array, name=input_name)
        value.shape = ir.Shape(array.shape) if not _symbolic(value) else value.shape
    graph = ir.Graph(
        list(inputs.values()),
        [name_output(outputs[tensor.name], tensor) for tensor in declared],
        nodes=ops.tape.nodes,
        initializers=[*ops.weights, *(inputs[input_name] for input_name in defaults)],
        opset_imports={"": OPSET, MICROSOFT: 1, contract.FUNCTION_DOMAIN: 1},
        name=name,
    )
    return ir.Model(
        graph,
        ir_version=IR_VERSION,
        producer_name=contract.FORMAT,
        producer_version=tda_export.__version__,
        functions=functions,
    )


def _symbolic(value: ir.Value) -> bool:
    assert value.shape is not None
    return not all(isinstance(axis, int) for axis in value.shape)
