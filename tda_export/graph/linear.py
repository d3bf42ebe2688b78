"""The parts of decode between the FFNs, as functions: products for few tokens, and norms of a sum.

Their bodies are ONNX Runtime's own operators. The native kernels that replace them can read weights while the previous
kernel is still running, which ONNX Runtime's own operators on CUDA cannot.
"""

from __future__ import annotations

import onnx_ir as ir

from tda_export.graph import operators
from tda_export.graph.attention_function import StepGraphBuilder
from tda_export.graph.ops import MICROSOFT, OPSET, Ops
from tda_export.models.spec import NormKind


class NormGraphBuilder(StepGraphBuilder):
    """Builds RMS norms of sums as functions, which products may make for themselves (`fused`)."""

    def add_and_norm(
        self, norm: str, x: ir.Value, residual: ir.Value, bias: ir.Value | None
    ) -> tuple[ir.Value, ir.Value]:
        if self.spec.norm != "rms":
            return super().add_and_norm(norm, x, residual, bias)
        normed, total = self.ops.multi(
            operators.ADD_NORM if bias is None else operators.ADD_BIAS_NORM,
            x,
            residual,
            self.weight(norm),
            *([] if bias is None else [bias]),
            outputs=(True, True),
            domain=operators.FUNCTION_DOMAIN,
            epsilon=self.spec.norm_epsilon,
            early=1,
        )
        return normed, total


class FunctionGraphBuilder(NormGraphBuilder):
    """Builds products as functions too, for half precision, which runs on CUDA."""

    def linear(self, x: ir.Value, name: str) -> ir.Value:
        if not self.weights.matrices[name].format.is_float:
            return super().linear(x, name)
        return self.ops.op(operators.LINEAR, x, self.weight(name), domain=operators.FUNCTION_DOMAIN, early=1)


def linear_functions(norm: NormKind = "rms") -> list[ir.Function]:
    """Define `tda::Linear` and `norm_functions`."""
    return [_linear_function(), *norm_functions(norm)]


def norm_functions(norm: NormKind = "rms") -> list[ir.Function]:
    """Define, for RMS norms, `tda::AddNorm` and `tda::AddBiasNorm`."""
    return [_add_norm_function(biased=False), _add_norm_function(biased=True)] if norm == "rms" else []


def _linear_function() -> ir.Function:
    """x [.., in] times weight [out, in] transposed."""
    ops = Ops()
    x, weight = ir.Value(name="x"), ir.Value(name="weight")
    y = ops.transposed_matmul(x, weight)
    return _function(operators.LINEAR, ops, [x, weight], [y], [ir.AttrInt64("early", 0)])


def _add_norm_function(*, biased: bool) -> ir.Function:
    """RMS norm of x + residual (+ bias), times weight; and the sum itself."""
    ops = Ops()
    inputs = [ir.Value(name=name) for name in ("x", "residual", "weight", "bias")[: 4 if biased else 3]]
    outputs = ops.multi(
        "SkipSimplifiedLayerNormalization",
        *inputs,
        outputs=(True, False, False, True),
        domain=MICROSOFT,
        epsilon=ir.RefAttr("epsilon", "epsilon", ir.AttributeType.FLOAT),
    )
    attributes = [ir.AttrFloat32("epsilon", 1e-6), ir.AttrInt64("early", 0)]
    return _function(operators.ADD_BIAS_NORM if biased else operators.ADD_NORM, ops, inputs, outputs, attributes)


def _function(
    name: str, ops: Ops, inputs: list[ir.Value], outputs: list[ir.Value], attributes: list[ir.Attr]
) -> ir.Function:
    for number, value in enumerate(outputs):
        value.name = f"output_{number}"
    imports = {"": OPSET, MICROSOFT: 1}
    graph = ir.Graph(inputs, outputs, nodes=ops.tape.nodes, opset_imports=imports, name=name)
    return ir.Function(operators.FUNCTION_DOMAIN, name, graph=graph, attributes=attributes)
