"""A thin layer over onnx-ir's tape: one call per node, shared constants, weights by reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from tda_export.graph.contract import IoTensor

OPSET = 21
IR_VERSION = 10  # loads in every tested runtime; 14 does not
MICROSOFT = "com.microsoft"  # ONNX Runtime's contributed operators

DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int32": ir.DataType.INT32,
    "int64": ir.DataType.INT64,
    "bool": ir.DataType.BOOL,
    "uint8": ir.DataType.UINT8,
    "int8": ir.DataType.INT8,
}


class Ops:
    """Collects the nodes, constants and weights of one graph or function body."""

    def __init__(self) -> None:
        self.tape = tape.Tape()
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._weights: dict[str, ir.Value] = {}

    def op(
        self, op_type: str, *inputs: ir.Value | None, domain: str = "", overload: str = "", **attributes: Any
    ) -> ir.Value:
        """Add a node with one output and return the output."""
        return self.tape.op(op_type, inputs, attributes, domain=domain, overload=overload)

    def multi(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        outputs: Sequence[bool],
        domain: str = "",
        overload: str = "",
        **attributes: Any,
    ) -> list[ir.Value]:
        """Add a node with several outputs; `outputs[k]` says whether the k-th is wanted. Return the wanted outputs."""
        values = [ir.Value(name=None if wanted else "") for wanted in outputs]
        self.tape.op_multi_out(op_type, inputs, attributes, outputs=values, domain=domain, overload=overload)
        return [value for value, wanted in zip(values, outputs, strict=True) if wanted]

    def constant(self, values: Any, dtype: str) -> ir.Value:
        """Return a small constant, the same value for the same content."""
        array = np.asarray(values, dtype=dtype)
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            value = self.op("Constant", value=ir.tensor(array, name=name))
            value.name = name
            self._constants[key] = value
        return self._constants[key]

    def weight(self, tensor: ir.ExternalTensor) -> ir.Value:
        """Return the initializer that refers to `tensor` in weights.bin."""
        if tensor.name not in self._weights:
            self._weights[tensor.name] = ir.Value(
                name=tensor.name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return self._weights[tensor.name]

    @property
    def weights(self) -> list[ir.Value]:
        """The weights used so far."""
        return list(self._weights.values())

    def cast(self, value: ir.Value, dtype: str) -> ir.Value:
        return self.op("Cast", value, to=int(DTYPES[dtype]))

    def matmul(self, x: ir.Value, weight: ir.Value) -> ir.Value:
        """Multiply x [.., M] by weight [M, N]."""
        return self.op("MatMul", x, weight)

    def transposed_matmul(self, x: ir.Value, weight: ir.Value) -> ir.Value:
        """Multiply x [.., M] by weight [N, M] transposed, without a transposed copy of the weight."""
        return self.op("FusedMatMul", x, weight, domain=MICROSOFT, transB=1)


def to_numpy(array: np.ndarray, dtype: str) -> np.ndarray:
    """Convert an array to a model's dtype, bfloat16 included."""
    return array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def io_value(tensor: IoTensor) -> ir.Value:
    """Make the graph input that a contract entry describes."""
    return ir.Value(name=tensor.name, shape=ir.Shape(tensor.axes), type=ir.TensorType(DTYPES[tensor.dtype]))


def name_output(value: ir.Value, tensor: IoTensor) -> ir.Value:
    """Give a computed value the name, dtype and axes of a contract entry."""
    value.name, value.shape, value.type = tensor.name, ir.Shape(tensor.axes), ir.TensorType(DTYPES[tensor.dtype])
    return value
