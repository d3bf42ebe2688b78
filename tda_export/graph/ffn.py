"""The FFN half of a layer: dense in prefill, `tda::IndexedFFN` in decode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from tda_export.graph import contract, operators
from tda_export.graph.decoder import Ffn, GraphBuilder
from tda_export.graph.operators import FfnInput
from tda_export.graph.ops import MICROSOFT, OPSET, Ops
from tda_export.models.spec import Activation, DecoderSpec


@dataclass(frozen=True)
class FfnForm:
    """The form of an FFN: act(gate · x) * (up · x) when `gated`, otherwise act(up · x), then the sum over down rows.

    `bias` adds b_gate and b_up to the two products. `two_levels` skips, for each token, neurons whose estimate is below
    a threshold.
    """

    activation: Activation
    gated: bool = True
    bias: bool = False
    two_levels: bool = False

    @property
    def first_part(self) -> str:
        """The matrix whose row is read first; the activation function is applied to its product."""
        return "gate" if self.gated else "up"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The inputs of IndexedFFN that this form uses, in the order of `operators.INDEXED_FFN_INPUTS`."""
        absent = {FfnInput.bias("down")}
        if not self.gated:
            absent |= {FfnInput.weight("gate"), FfnInput.bias("gate")}
        if not self.bias:
            absent |= {FfnInput.bias("gate"), FfnInput.bias("up")}
        if not self.two_levels:
            absent |= {FfnInput.NEURON_SCALE, FfnInput.TOKEN_THRESHOLDS}
        return tuple(name for name in operators.INDEXED_FFN_INPUTS if name not in absent)


def ffn_form(spec: DecoderSpec, *, two_levels: bool = False) -> FfnForm:
    """Return the form of a decoder's FFN."""
    return FfnForm(spec.activation, gated=spec.gated, bias=spec.ffn_bias, two_levels=two_levels)


def activate(ops: Ops, activation: Activation, x: ir.Value) -> ir.Value:
    """Apply an activation function."""
    if activation == "silu":
        return ops.op("Mul", x, ops.op("Sigmoid", x))
    if activation == "relu":
        return ops.op("Relu", x)
    return ops.op("Gelu", x, approximate="tanh" if activation == "gelu_tanh" else "none")


def dense_activations(graph: GraphBuilder, layer: int, x: ir.Value) -> ir.Value:
    """Compute h [1, S, F] for every neuron from x [1, S, M]: act(gate · x) * (up · x), or act(up · x) without gates."""

    def product(part: str) -> ir.Value:
        y = graph.product(x, contract.ffn_weight(layer, part))  # [1, S, F]
        bias = contract.ffn_bias(layer, part)
        return graph.ops.op("Add", y, graph.weight(bias)) if graph.spec.ffn_bias else y

    return combine(graph.ops, graph.spec, product)


def combine(ops: Ops, spec: DecoderSpec, product: Callable[[str], ir.Value]) -> ir.Value:
    """Compute h from the products of x with the FFN's first matrices, given by part."""
    first, *rest = (product(part) for part in spec.ffn_parts[:-1])
    activated = activate(ops, spec.activation, first)
    return ops.op("Mul", activated, rest[0]) if rest else activated


# act(gate) * up [.., F], given both, or one tensor [.., 2 F] that holds them side by side
Gated = Callable[..., ir.Value]


def plain_ffn(graph: GraphBuilder, gated: Gated | None = None) -> Ffn:
    """Return the FFN of a layer from its stored matrices: down(act(gate x) * up x), without gates down(act(up x)).

    Args:
        graph: The graph.
        gated: Computes the activations of a gated FFN in place of plain operators.
    """
    ops, spec = graph.ops, graph.spec

    def apart(gate: ir.Value, up: ir.Value | None = None) -> ir.Value:
        if up is None:
            sizes = ops.constant([spec.ffn_size, spec.ffn_size], "int64")
            gate, up = ops.multi("Split", gate, sizes, outputs=(True, True), axis=2)
        return ops.op("Mul", activate(ops, spec.activation, gate), up)

    def ffn(layer: int, x: ir.Value) -> tuple[ir.Value, ir.Value | None]:
        packed = contract.linear_weight(layer, "gate_up")
        stored = (
            [packed]
            if packed in graph.weights.matrices
            else [contract.ffn_weight(layer, part) for part in spec.ffn_parts[:-1]]
        )
        products = [graph.affine(x, name) for name in stored]
        h = (gated or apart)(*products) if spec.gated else activate(ops, spec.activation, *products)
        bias = graph.weight(contract.ffn_bias(layer, "down")) if spec.ffn_bias else None
        return graph.linear(h, contract.ffn_weight(layer, "down")), bias

    return ffn


def indexed_ffn(ops: Ops, form: FfnForm, layer: int, inputs: dict[str, ir.Value]) -> ir.Value:
    """Add the node that computes the FFN of x [1, S, M] from only the rows in mask_indices.

    Args:
        ops: The graph.
        form: The form of the FFN.
        layer: The layer's number, which selects the entry of token_thresholds.
        inputs: By the names of `form.inputs`, and `b_down` if the output has a bias.

    Returns:
        y [1, S, M].
    """
    positions = [inputs.get(name) for name in operators.INDEXED_FFN_INPUTS]
    while positions[-1] is None:
        positions.pop()
    return ops.op(
        operators.INDEXED_FFN,
        *positions,
        domain=operators.FUNCTION_DOMAIN,
        activation=form.activation,
        gated=int(form.gated),
        layer=layer,
        early=1,
    )


def indexed_ffn_function(form: FfnForm, *, down_bias: bool = False) -> ir.Function:
    """Define `tda::IndexedFFN`: its body runs in any ONNX Runtime where no native kernel is registered.

    The inputs are those of `operators.INDEXED_FFN_INPUTS`, by position; inputs that the form does not use are left
    empty. The body gathers the rows. For a padded entry it gathers row 0 and sets the activation to zero. An index
    below -1 becomes an index past the last row, which Gather refuses (on CUDA it reads nothing).
    """
    ops = Ops()
    inputs = {name: ir.Value(name=name) for name in operators.INDEXED_FFN_INPUTS}
    x, indices = inputs[FfnInput.X], inputs[FfnInput.MASK_INDICES]
    padded = ops.op("Equal", indices, ops.constant([contract.PADDING_INDEX], "int32"))  # [K]
    foreign = ops.op("Less", indices, ops.constant([contract.PADDING_INDEX], "int32"))  # [K]
    past_every_row = ops.constant([np.iinfo(np.int32).max], "int32")
    rows = ops.op("Where", padded, ops.constant([0], "int32"), ops.op("Where", foreign, past_every_row, indices))  # [K]

    def product(part: str) -> ir.Value:
        y = ops.transposed_matmul(x, ops.op("Gather", inputs[FfnInput.weight(part)], rows, axis=0))  # [1, S, K]
        return ops.op("Add", y, ops.op("Gather", inputs[FfnInput.bias(part)], rows, axis=0)) if form.bias else y

    activated = activate(ops, form.activation, product(form.first_part))  # [1, S, K]
    h = ops.op("Mul", activated, product("up")) if form.gated else activated
    dropped = padded
    if form.two_levels:
        layer = ops.op("Constant", value_int=ir.RefAttr("value_int", "layer", ir.AttributeType.INT))
        threshold = ops.op("Gather", inputs[FfnInput.TOKEN_THRESHOLDS], layer, axis=0)  # float32 scalar
        scale = ops.op("Gather", inputs[FfnInput.NEURON_SCALE], rows, axis=0)  # float32 [K]
        estimate = ops.op("Mul", ops.op("Abs", ops.cast(activated, "float32")), scale)  # float32 [1, S, K]
        dropped = ops.op("Or", padded, ops.op("Less", estimate, threshold))  # [1, S, K]
    zero = ops.op("CastLike", ops.constant(0.0, "float32"), h)
    h = ops.op("Where", dropped, zero, h)  # [1, S, K]
    y = ops.op("MatMul", h, ops.op("Gather", inputs[FfnInput.weight("down")], rows, axis=0))  # [1, S, M]
    if down_bias:
        y = ops.op("Add", y, inputs[FfnInput.bias("down")])
    y.name = "y"
    graph = ir.Graph(
        list(inputs.values()), [y], nodes=ops.tape.nodes, opset_imports={"": OPSET, MICROSOFT: 1}, name="IndexedFFN"
    )
    return ir.Function(
        operators.FUNCTION_DOMAIN,
        operators.INDEXED_FFN,
        graph=graph,
        attributes=[
            ir.AttrString("activation", form.activation),
            ir.AttrInt64("gated", int(form.gated)),
            ir.AttrInt64("layer", 0),
            ir.AttrInt64("early", 0),
        ],
    )
