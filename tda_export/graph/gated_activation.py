"""`tda::GatedActivation`: act(gate) * up in one node instead of three or four of ONNX Runtime's own."""

from __future__ import annotations

import onnx_ir as ir

from tda_export.graph import operators
from tda_export.graph.ffn import activate
from tda_export.graph.ops import MICROSOFT, OPSET, Ops
from tda_export.models.spec import Activation

SIDE_BY_SIDE = "side_by_side"  # the function's overload: gate and up in one input


def gated_activation(ops: Ops, activation: Activation, gate: ir.Value, up: ir.Value | None = None) -> ir.Value:
    """Add the node that computes act(gate) * up, [.., F], from two inputs [.., F] or from one input [.., 2 F]."""
    return ops.op(
        operators.GATED_ACTIVATION,
        gate,
        *([] if up is None else [up]),
        domain=operators.FUNCTION_DOMAIN,
        overload=SIDE_BY_SIDE if up is None else "",
        activation=activation,
    )


def gated_activation_functions(activation: Activation) -> list[ir.Function]:
    """Define `tda::GatedActivation` for one and for two inputs."""
    return [_function(activation, packed=packed) for packed in (False, True)]


def _function(activation: Activation, *, packed: bool) -> ir.Function:
    ops = Ops()
    inputs = [ir.Value(name=name) for name in (("gate_up",) if packed else ("gate", "up"))]
    gate, up = ops.multi("Split", *inputs, outputs=(True, True), axis=-1, num_outputs=2) if packed else inputs
    h = ops.op("Mul", activate(ops, activation, gate), up)
    h.name = "h"
    imports = {"": OPSET, MICROSOFT: 1}
    graph = ir.Graph(inputs, [h], nodes=ops.tape.nodes, opset_imports=imports, name=operators.GATED_ACTIVATION)
    return ir.Function(
        operators.FUNCTION_DOMAIN,
        operators.GATED_ACTIVATION,
        SIDE_BY_SIDE if packed else "",
        graph=graph,
        attributes=[ir.AttrString("activation", activation)],
    )
