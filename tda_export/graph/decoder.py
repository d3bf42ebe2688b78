"""What all graphs of a decoder share: embedding, layers, norms, logits, and the model around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

import tda_export
from tda_export.graph import contract
from tda_export.graph.attention import Lengths, attention
from tda_export.graph.contract import IoTensor, ModelShape
from tda_export.graph.ops import IR_VERSION, MICROSOFT, OPSET, Ops, io_value, name_output
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


class GraphBuilder:
    """One graph being built: its operators, weights, inputs by name, and the outputs made so far."""

    def __init__(self, spec: DecoderSpec, weights: WeightTable, dtype: str, inputs: Sequence[IoTensor]) -> None:
        self.spec, self.weights, self.dtype = spec, weights, dtype
        self.ops = Ops()
        self.inputs = {tensor.name: io_value(tensor) for tensor in inputs}
        self.outputs: dict[str, ir.Value] = {}

    def weight(self, name: str) -> ir.Value:
        """Return a tensor of weights.bin."""
        return self.ops.weight(self.weights[name])

    def layers(self, lengths: Lengths, ffn: Ffn) -> ir.Value:
        """Run embedding, layers and final norm; record present keys and values; return the hidden state [1, S, M]."""
        ops, spec = self.ops, self.spec
        residual = ops.op("Gather", self.weight(contract.EMBEDDING), self.inputs[contract.INPUT_IDS])  # [1, S, M]
        normed = self._first_norm(self.weight(contract.attention_norm(0)), residual)
        for layer in range(spec.num_layers):
            past = self.inputs[contract.past_key(layer)], self.inputs[contract.past_value(layer)]
            attended, key, value = attention(ops, spec, self.weights, layer, normed, past, lengths, self.linear)
            self.outputs[contract.present_key(layer)], self.outputs[contract.present_value(layer)] = key, value
            bias = self.weight(contract.attention_out_bias(layer)) if spec.attention_out_bias else None
            normed, residual = self.add_and_norm(contract.ffn_norm(layer), attended, residual, bias)
            y, bias = ffn(layer, normed)
            last = layer == spec.num_layers - 1
            norm = contract.FINAL_NORM if last else contract.attention_norm(layer + 1)
            normed, residual = self.add_and_norm(norm, y, residual, bias)
        return normed

    def linear(self, x: ir.Value, name: str) -> ir.Value:
        """Multiply x [.., in] by a weight of weights.bin, which is stored [out, in]; no bias."""
        return self.ops.transposed_matmul(x, self.weight(name))

    def logits(self, hidden: ir.Value) -> ir.Value:
        """Multiply the hidden state [1, S, M] by the head; float32 [1, S, V]."""
        return self.to_float32(self.linear(hidden, contract.EMBEDDING if self.spec.tied_head else contract.HEAD))

    def to_float32(self, value: ir.Value) -> ir.Value:
        return value if self.dtype == "float32" else self.ops.cast(value, "float32")

    def _first_norm(self, weight: ir.Value, x: ir.Value) -> ir.Value:
        """RMS norm (arXiv 1910.07467) in standard operators, which ONNX Runtime fuses and the checker knows."""
        ops, x32 = self.ops, self.to_float32(x)
        mean = ops.op("ReduceMean", ops.op("Pow", x32, ops.constant(2.0, "float32")), ops.constant([-1], "int64"))
        root = ops.op("Sqrt", ops.op("Add", mean, ops.constant(self.spec.norm_epsilon, "float32")))
        normed = ops.op("Div", x32, root)
        return ops.op("Mul", normed if self.dtype == "float32" else ops.cast(normed, self.dtype), weight)

    def add_and_norm(
        self, norm: str, x: ir.Value, residual: ir.Value, bias: ir.Value | None
    ) -> tuple[ir.Value, ir.Value]:
        """Return the norm of x + residual + bias, and that sum, in one node."""
        normed, total = self.ops.multi(
            "SkipSimplifiedLayerNormalization",
            x,
            residual,
            self.weight(norm),
            *([bias] if bias is not None else []),
            outputs=(True, False, False, True),
            domain=MICROSOFT,
            epsilon=self.spec.norm_epsilon,
        )
        return normed, total

    def model(
        self,
        name: str,
        outputs: Sequence[IoTensor],
        defaults: dict[str, np.ndarray],
        functions: Sequence[ir.Function] = (),
    ) -> ir.Model:
        """Put the graph together: named outputs, initializers (weights and the inputs' defaults), functions."""
        for input_name, array in defaults.items():
            value = self.inputs[input_name]
            value.const_value = ir.tensor(array, name=input_name)
        graph = ir.Graph(
            list(self.inputs.values()),
            [name_output(self.outputs[tensor.name], tensor) for tensor in outputs],
            nodes=self.ops.tape.nodes,
            initializers=[*self.ops.weights, *(self.inputs[input_name] for input_name in defaults)],
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
