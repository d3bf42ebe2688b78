"""The plain dense graph: the baseline that `bench` compares with, as ONNX Runtime GenAI's builder would emit it.

Weights are stored [in, out] for MatMul. The graph has no statistics, no prompt mask and no operator of this project.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from tda_export.graph import contract
from tda_export.graph.attention import attention_lengths
from tda_export.graph.decoder import GraphBuilder, model_shape
from tda_export.graph.ffn import plain_ffn
from tda_export.graph.weights_file import WeightTable
from tda_export.models.spec import DecoderSpec
from tda_export.weights.matrix import Matrix


def transposed_weights(matrices: Mapping[str, Matrix]) -> dict[str, str]:
    """Map the names of tensors that the dense graph stores transposed ([in, out] instead of [out, in]) to the original
    names."""
    looked_up = {contract.EMBEDDING} if contract.HEAD in matrices else set()
    names = [name for name, matrix in matrices.items() if matrix.major == "output" and name not in looked_up]
    return {contract.transposed(name): name for name in names}


def dense_weight_table(weights: WeightTable) -> WeightTable:
    """Add the transposed tensors to those of weights.bin.

    Each refers to the bytes of the original tensor, which has the same size. The session must be given the transposed
    values as initializers.
    """
    table = WeightTable(weights, weights.matrices)
    for name, original in transposed_weights(weights.matrices).items():
        tensor = weights[original]
        table[name] = ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=ir.Shape(tuple(tensor.shape.numpy())[::-1]),
            name=name,
            base_dir=tensor.base_dir,
        )
    return table


class DenseGraphBuilder(GraphBuilder):
    """Multiplies by weights stored as [in, out]."""

    def product(self, x: ir.Value, name: str) -> ir.Value:
        given = self.weights.matrices[name].major == "input"
        return self.ops.matmul(x, self.weight(name if given else contract.transposed(name)))


def build_dense(spec: DecoderSpec, weights: WeightTable, dtype: str) -> ir.Model:
    """Build the graph; `weights` come from `dense_weight_table`."""
    shape = model_shape(spec, dtype)
    graph = DenseGraphBuilder(spec, weights, dtype, contract.dense_inputs(shape))
    ops = graph.ops

    hidden = graph.layers(attention_lengths(ops, graph.inputs[contract.ATTENTION_MASK]), plain_ffn(graph))
    # Only the last position of a prompt, as GenAI does.
    end = ops.constant([2**63 - 1], "int64")
    last = ops.op("Slice", hidden, ops.constant([-1], "int64"), end, ops.constant([1], "int64"))  # [1, 1, M]
    graph.outputs[contract.LOGITS] = graph.logits(last)
    return graph.model("dense", contract.dense_outputs(shape), {})
