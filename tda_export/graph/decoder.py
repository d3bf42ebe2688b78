"""The common parts of all graphs of a decoder: embedding, layers, norms, logits, and the model around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

import tda_export
from tda_export.graph import contract, kv_formats, operators
from tda_export.graph.attention import Lengths, attention, call_positions, group_query_attention
from tda_export.graph.cache_formats import CACHE_FORMATS
from tda_export.graph.contract import IoTensor, ModelShape
from tda_export.graph.integer_linear import integer_functions, integer_linear, integer_row_linear, integer_rows
from tda_export.graph.ops import IR_VERSION, MICROSOFT, OPSET, Ops, io_value, name_output
from tda_export.graph.stored_attention import stored_attention
from tda_export.graph.weights_file import WeightTable
from tda_export.models.spec import DecoderSpec

# A layer's FFN: (layer, normalised x [1, S, M]) -> (y [1, S, M], the bias that the next norm adds, or None)
Ffn = Callable[[int, ir.Value], tuple[ir.Value, ir.Value | None]]


def model_shape(spec: DecoderSpec, dtype: str, kv: str = kv_formats.KV_FLOAT) -> ModelShape:
    """Return the contract's sizes for a decoder whose keys and values are stored as `kv` says."""
    return ModelShape(
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        hidden_size=spec.hidden_size,
        ffn_size=spec.ffn_size,
        vocab_size=spec.vocab_size,
        max_positions=spec.max_positions,
        dtype=dtype,
        kv=kv,
    )


class GraphBuilder:
    """One graph being built: its operators, weights, inputs by name, and the outputs made so far."""

    def __init__(
        self,
        spec: DecoderSpec,
        weights: WeightTable,
        dtype: str,
        inputs: Sequence[IoTensor],
        kv: str = kv_formats.KV_FLOAT,
    ) -> None:
        self.spec, self.weights, self.dtype = spec, weights, dtype
        self.shape = model_shape(spec, dtype, kv)
        self.ops = Ops()
        self.inputs = {tensor.name: io_value(tensor) for tensor in inputs}
        self.outputs: dict[str, ir.Value] = {}

    def weight(self, name: str) -> ir.Value:
        """Return a tensor of weights.bin."""
        return self.ops.weight(self.weights[name])

    def layers(self, lengths: Lengths, ffn: Ffn) -> ir.Value:
        """Run embedding, layers and final norm; record present keys and values; return the hidden state [1, S, M]."""
        ops, spec = self.ops, self.spec
        stream = ResidualStream(self, self._embedded(lengths))
        normed_input, after = spec.norm_placement in ("before", "both"), spec.norm_placement == "after"
        for layer in range(spec.num_layers):
            x = stream.normed(contract.attention_norm(layer)) if normed_input else stream.value
            caches = contract.layer_caches(self.shape, layer)
            past = [self.inputs[cache.past] for cache in caches]
            projected = [self.affine(x, name) for name in self._projections(layer)]
            attended, *present = attention(
                ops, spec, self.weights, layer, projected, past, lengths, self._rms_norm, self.attend
            )
            y = self.linear(attended, contract.attention_out_weight(layer))  # [1, S, M]; the next norm adds the bias
            self.outputs |= {cache.present: value for cache, value in zip(caches, present, strict=True)}
            bias = self.weight(contract.attention_out_bias(layer)) if spec.attention_out_bias else None
            if spec.parallel_residual:
                attended = y if bias is None else ops.op("Add", y, bias)
                y, bias = ffn(layer, stream.normed(contract.ffn_norm(layer)))
                stream.add(ops.op("Add", attended, y), bias)
                continue
            stream.add(*self.branch(y, bias, contract.attention_output_norm(layer)))
            if after:
                stream.restart(stream.normed(contract.attention_norm(layer)))
            x = stream.normed(contract.ffn_norm(layer)) if normed_input else stream.value
            stream.add(*self.branch(*ffn(layer, x), contract.ffn_output_norm(layer)))
            if after:
                stream.restart(stream.normed(contract.ffn_norm(layer)))
        return stream.normed(contract.FINAL_NORM) if spec.final_norm else stream.value

    def _embedded(self, lengths: Lengths) -> ir.Value:
        """Look up the tokens' embeddings, and add learned positions where the family has them: [1, S, M]."""
        ops, spec, input_ids = self.ops, self.spec, self.inputs[contract.INPUT_IDS]
        embedded = self._rows_of(contract.EMBEDDING, input_ids)  # [1, S, width]
        if spec.embedding_scale != 1.0:
            embedded = self._scaled(embedded, spec.embedding_scale)
        if spec.embedding_width != spec.hidden_size:
            embedded = self.linear(embedded, contract.PROJECT_IN)
        if spec.position_offset is None:
            return embedded
        rows = ops.op("Gather", self.weight(contract.POSITIONS), call_positions(ops, input_ids, lengths))
        return ops.op("Add", embedded, rows)

    def branch(self, y: ir.Value, bias: ir.Value | None, norm: str) -> tuple[ir.Value, ir.Value | None]:
        """Normalise and scale what attention or FFN add to the residual, where the family does so; return it and the
        bias that remains to be added."""
        normed = self.spec.norm_placement in ("output", "both")
        if bias is not None and (normed or self.spec.residual_scale != 1.0):
            y, bias = self.ops.op("Add", y, bias), None
        if normed:
            y = self.norm(y, norm)
        if self.spec.residual_scale != 1.0:
            # PyTorch multiplies by the number in float32, which differs from the product with it in half precision.
            scaled = self.ops.op("Mul", self.to_float32(y), self.ops.constant(self.spec.residual_scale, "float32"))
            y = scaled if self.dtype == "float32" else self.ops.cast(scaled, self.dtype)
        return y, bias

    def _scaled(self, x: ir.Value, scale: float) -> ir.Value:
        return self.ops.op("Mul", x, self.ops.op("CastLike", self.ops.constant(scale, "float32"), x))

    def stored(self, name: str) -> list[ir.Value]:
        """Return the tensors that store a matrix of weights.bin."""
        return [self.weight(tensor.name) for tensor in self.weights.matrices[name].tensors]

    def _rows_of(self, name: str, indices: ir.Value) -> ir.Value:
        """Look up rows of a matrix of weights.bin: [.., columns] in the graph's dtype."""
        matrix = self.weights.matrices[name]
        if matrix.format.is_float:
            return self.ops.op("Gather", self.weight(name), indices)
        return integer_rows(self.ops, matrix, indices, self.stored(name), self.dtype)

    def product(self, x: ir.Value, name: str) -> ir.Value:
        """Multiply x [.., in] by a matrix of weights.bin of either layout: y [.., out], without bias."""
        ops, matrix = self.ops, self.weights.matrices[name]
        if matrix.format.is_float:
            return (ops.matmul if matrix.major == "input" else ops.transposed_matmul)(x, self.weight(name))
        if matrix.major == "output":
            return integer_linear(ops, matrix, x, self.stored(name))
        row_price, dense = self.weight(contract.row_price(name)), ops.constant([0.0], "float32")
        return integer_row_linear(ops, matrix, x, self.stored(name), row_price, dense)

    def linear(self, x: ir.Value, name: str) -> ir.Value:
        """Multiply as `product` does, for products outside the FFN; some graphs use a function for them."""
        return self.product(x, name)

    def affine(self, x: ir.Value, name: str) -> ir.Value:
        """Multiply as `linear` does, and add the bias where the matrix has one."""
        y, bias = self.linear(x, name), contract.linear_bias(name)
        return self.ops.op("Add", y, self.weight(bias)) if bias in self.weights else y

    def attend(self, inputs: Sequence[ir.Value | None], settings: dict[str, float]) -> list[ir.Value]:
        """Add the nodes of attention (`attention.Attend`); some graphs use a function for them."""
        if self.shape.kv != kv_formats.KV_FLOAT:
            format = CACHE_FORMATS[self.shape.kv]
            return stored_attention(self.ops, format, inputs, self.spec.head_size, settings)
        attended, *present = group_query_attention(self.ops, inputs, **settings)
        packed = self.weights.matrices.get(contract.qkv_weight(0))
        if packed is not None and packed.major == "input":
            # ONNX Runtime before 1.31 infers the width of Q, K and V together, which the next product refuses.
            width = self.spec.num_heads * self.spec.head_size
            attended = self.ops.op("Reshape", attended, self.ops.constant([0, 0, width], "int64"))
        return [attended, *present]

    def attention_functions(self) -> list[ir.Function]:
        """Define the functions that the nodes of attention call."""
        return []

    def _projections(self, layer: int) -> list[str]:
        """Name the matrices of queries, keys and values: one (packed) or three."""
        packed = contract.qkv_weight(layer)
        if packed in self.weights.matrices:
            return [packed]
        return [contract.linear_weight(layer, part) for part in ("q", "k", "v")]

    def logits(self, hidden: ir.Value) -> ir.Value:
        """Multiply the hidden state [1, S, M] by the head; float32 [1, S, V]."""
        ops, spec = self.ops, self.spec
        if spec.embedding_width != spec.hidden_size:
            hidden = self.linear(hidden, contract.PROJECT_OUT)
        head = contract.HEAD if contract.HEAD in self.weights.matrices else contract.EMBEDDING  # a tied one
        logits = self.to_float32(self.linear(hidden, head))
        if spec.logits_scale != 1.0:
            logits = ops.op("Mul", logits, ops.constant(spec.logits_scale, "float32"))
        if spec.logits_softcap is None:
            return logits
        cap = ops.constant(spec.logits_softcap, "float32")
        return ops.op("Mul", ops.op("Tanh", ops.op("Div", logits, cap)), cap)

    def to_float32(self, value: ir.Value) -> ir.Value:
        return value if self.dtype == "float32" else self.ops.cast(value, "float32")

    def norm(self, x: ir.Value, name: str) -> ir.Value:
        """Return the norm of x [.., M]."""
        if self.spec.norm == "rms":
            return self._rms_norm(x, name)
        bias = self.weight(contract.norm_bias(name))
        return self.ops.op("LayerNormalization", x, self.weight(name), bias, axis=-1, epsilon=self.spec.norm_epsilon)

    def _rms_norm(self, x: ir.Value, name: str) -> ir.Value:
        """RMS norm (arXiv 1910.07467) in standard operators, which ONNX Runtime fuses and the checker knows."""
        ops, x32 = self.ops, self.to_float32(x)
        mean = ops.op("ReduceMean", ops.op("Pow", x32, ops.constant(2.0, "float32")), ops.constant([-1], "int64"))
        root = ops.op("Sqrt", ops.op("Add", mean, ops.constant(self.spec.norm_epsilon, "float32")))
        normed = ops.op("Div", x32, root)
        return ops.op("Mul", normed if self.dtype == "float32" else ops.cast(normed, self.dtype), self.weight(name))

    def add_and_norm(
        self, norm: str, x: ir.Value, residual: ir.Value, bias: ir.Value | None
    ) -> tuple[ir.Value, ir.Value]:
        """Return the norm of x + residual + bias, and the sum itself, in one node."""
        rms = self.spec.norm == "rms"
        normed, total = self.ops.multi(
            "SkipSimplifiedLayerNormalization" if rms else "SkipLayerNormalization",
            x,
            residual,
            self.weight(norm),
            *([] if rms else [self.weight(contract.norm_bias(norm))]),
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
        """Assemble the model: named outputs, initializers (weights and the inputs' defaults), functions."""
        for input_name, array in defaults.items():
            value = self.inputs[input_name]
            value.const_value = ir.tensor(array, name=input_name)
        graph = ir.Graph(
            list(self.inputs.values()),
            [name_output(self.outputs[tensor.name], tensor) for tensor in outputs],
            nodes=self.ops.tape.nodes,
            initializers=[*self.ops.weights, *(self.inputs[input_name] for input_name in defaults)],
            opset_imports={"": OPSET, MICROSOFT: 1, operators.FUNCTION_DOMAIN: 1},
            name=name,
        )
        return ir.Model(
            graph,
            ir_version=IR_VERSION,
            producer_name=contract.FORMAT,
            producer_version=tda_export.__version__,
            functions=[*functions, *integer_functions(self.weights.matrices.values())],
        )


def last_positions(ops: Ops, hidden: ir.Value, number: ir.Value, attended: ir.Value) -> ir.Value:
    """Keep the last `number` positions of hidden [1, S, M] before any right padding; 0 keeps all.

    Args:
        ops: The graph.
        hidden: The hidden state.
        number: int64 [1].
        attended: int64 [1], how many of the S tokens are not padding.
    """
    zero = ops.constant([0], "int64")
    every = ops.op("Equal", number, zero)
    start = ops.op("Where", every, zero, ops.op("Max", ops.op("Sub", attended, number), zero))
    end = ops.op("Where", every, ops.constant([np.iinfo(np.int64).max], "int64"), attended)
    return ops.op("Slice", hidden, start, end, ops.constant([1], "int64"))  # [1, number, M]


class ResidualStream:
    """The residual x [1, S, M] of a graph. Additions are deferred and fused with the norm that follows."""

    def __init__(self, graph: GraphBuilder, start: ir.Value) -> None:
        self._graph, self._total = graph, start
        self._pending: tuple[ir.Value, ir.Value | None] | None = None

    @property
    def value(self) -> ir.Value:
        """The residual itself."""
        if self._pending is not None:
            (y, bias), self._pending = self._pending, None
            ops = self._graph.ops
            self._total = ops.op("Add", self._total, y if bias is None else ops.op("Add", y, bias))
        return self._total

    def add(self, y: ir.Value, bias: ir.Value | None) -> None:
        """Add y [1, S, M] and a bias [M]."""
        self._total, self._pending = self.value, (y, bias)

    def normed(self, norm: str) -> ir.Value:
        """Return the norm of the residual."""
        if self._pending is None:
            return self._graph.norm(self._total, norm)
        (y, bias), self._pending = self._pending, None
        normed, self._total = self._graph.add_and_norm(norm, y, self._total, bias)
        return normed

    def restart(self, value: ir.Value) -> None:
        """Continue with another value."""
        self._total, self._pending = value, None
