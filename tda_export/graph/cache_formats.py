"""How a cache stores keys and values that are not stored as activations are, in ONNX Runtime's own operators.

`KvCodes` are 8-bit codes: the keys or values of one token and head, x [D], are stored as x = scale c, scale = max |x| /
127 in float32 and c in -127 to 127, rounded to nearest, ties to even; where x is not finite the scale is NaN. Keys are
multiplied by a Hadamard matrix (`hadamard`) first, which spreads a key's few large elements over all elements. Queries
are multiplied by it as well, so that scores do not change.

`KvHalves` are float16, rounded to nearest, ties to even; from 65,520 on they are infinite.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from tda_export.graph import kv_formats, operators
from tda_export.graph.kv_formats import CACHE_KINDS, CacheTensorKind
from tda_export.graph.ops import Ops

LARGEST_CODE = 127.0


class CacheFormat(ABC):
    """A format: the operator that attends to such a cache, and how keys and values of a call are stored and read.

    `kv` is its name, of `kv_formats.KV_FORMATS`.
    """

    kv: str
    operator: str
    inputs: tuple[str, ...]  # the operator's
    outputs: tuple[str, ...]

    @property
    def kinds(self) -> tuple[CacheTensorKind, ...]:
        """The tensors of such a cache."""
        return CACHE_KINDS[self.kv]

    @abstractmethod
    def spread(self, ops: Ops, x: ir.Value, head_size: int) -> ir.Value:
        """Multiply queries or keys [1, S, heads, D] by a matrix that leaves scores as they are; float32."""

    @abstractmethod
    def stored(self, ops: Ops, x: ir.Value) -> list[ir.Value]:
        """Store x, float32 [1, S, KV, D]: a tensor of each kind, [1, S, KV, D] or [1, S, KV, 1]."""

    @abstractmethod
    def read(self, ops: Ops, stored: Sequence[ir.Value]) -> ir.Value:
        """Return what is stored, float32."""


class KvHalves(CacheFormat):
    kv = kv_formats.KV_FLOAT16
    operator, inputs = operators.ATTENTION_16, operators.ATTENTION_INPUTS
    outputs = operators.ATTENTION_OUTPUTS

    def spread(self, ops: Ops, x: ir.Value, head_size: int) -> ir.Value:
        return ops.cast(x, "float32")

    def stored(self, ops: Ops, x: ir.Value) -> list[ir.Value]:
        return [ops.cast(x, "float16")]

    def read(self, ops: Ops, stored: Sequence[ir.Value]) -> ir.Value:
        (halves,) = stored
        return ops.cast(halves, "float32")


class KvCodes(CacheFormat):
    kv = kv_formats.KV_INT8
    operator, inputs = operators.ATTENTION_8, operators.ATTENTION_8_INPUTS
    outputs = operators.ATTENTION_8_OUTPUTS

    def spread(self, ops: Ops, x: ir.Value, head_size: int) -> ir.Value:
        return ops.op("MatMul", ops.cast(x, "float32"), ops.constant(hadamard(head_size), "float32"))

    def stored(self, ops: Ops, x: ir.Value) -> list[ir.Value]:
        last = ops.constant([-1], "int64")
        largest = ops.op("ReduceMax", ops.op("Abs", x), last, keepdims=1)
        spoiled = ops.op("ReduceSum", ops.op("Sub", x, x), last, keepdims=1)  # NaN where x is not finite, otherwise 0
        scale = ops.op("Add", ops.op("Div", largest, ops.constant(LARGEST_CODE, "float32")), spoiled)
        one = ops.constant(1.0, "float32")
        divisor = ops.op("Where", ops.op("Greater", scale, ops.constant(0.0, "float32")), scale, one)
        rounded = ops.op("Round", ops.op("Div", x, divisor))
        clipped = ops.op("Clip", rounded, ops.constant(-LARGEST_CODE, "float32"), ops.constant(LARGEST_CODE, "float32"))
        return [ops.cast(clipped, "int8"), scale]

    def read(self, ops: Ops, stored: Sequence[ir.Value]) -> ir.Value:
        codes, scales = stored
        return ops.op("Mul", ops.cast(codes, "float32"), scales)


CACHE_FORMATS: dict[str, CacheFormat] = {format.kv: format for format in (KvHalves(), KvCodes())}


def hadamard(size: int) -> np.ndarray:
    """Return the orthogonal matrix for keys and queries of `size` elements, float32 [size, size].

    Sylvester's matrix of the largest power of two that divides the size, in blocks along the diagonal. It is symmetric,
    so it is its own inverse.
    """
    block = np.ones((1, 1))
    while size % (2 * len(block)) == 0:
        block = np.block([[block, block], [block, -block]])
    return np.kron(np.eye(size // len(block)), block / np.sqrt(len(block))).astype(np.float32)
