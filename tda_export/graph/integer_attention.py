"""Attention to a cache of 8-bit codes, in ONNX Runtime's own operators: the body of `tda::Attention8`, also used in
prefill.

A key or value of one token and head, x [D], is stored as x = scale c, scale = max |x| / 127 in float32 and c in -127 to
127, rounded to nearest, ties to even; where x is not finite the scale is NaN. Keys are stored after rotary embedding
and multiplied by a Hadamard matrix (`hadamard`), which spreads a key's few large elements over all elements. Queries
are multiplied by it as well, so that scores do not change. Tokens attend to the stored codes, also to those of their
own call, so the result does not depend on how tokens are split into calls. Codes of the past are passed on unchanged.

Half precision has the same codes and scales: the matrix and the rounding are computed in float32. Its body de-quantises
to half precision, which GroupQueryAttention reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from tda_export.graph.attention import group_query_attention
from tda_export.graph.ops import MICROSOFT, Ops

LARGEST_CODE = 127.0
# GroupQueryAttention's attributes that the body passes on.
PASSED_ON = ("num_heads", "kv_num_heads", "local_window_size", "scale", "softcap")
Attribute = float | ir.Attr


def hadamard(size: int) -> np.ndarray:
    """Return the orthogonal matrix for keys and queries of `size` elements, float32 [size, size].

    Sylvester's matrix of the largest power of two that divides the size, in blocks along the diagonal. It is symmetric,
    so it is its own inverse.
    """
    block = np.ones((1, 1))
    while size % (2 * len(block)) == 0:
        block = np.block([[block, block], [block, -block]])
    return np.kron(np.eye(size // len(block)), block / np.sqrt(len(block))).astype(np.float32)


def integer_attention(
    ops: Ops, inputs: Sequence[ir.Value | None], head_size: int, settings: Mapping[str, Attribute]
) -> list[ir.Value]:
    """Add the nodes.

    Args:
        ops: The graph or function body.
        inputs: In the order of `operators.ATTENTION_8_INPUTS`; queries, keys, values and tables in one dtype, scales
            in float32.
        head_size: D.
        settings: The attributes of `tda::Attention8`, as numbers or as references to the function's attributes.

    Returns:
        Attention's output [1, S, H D], present keys and values, int8 [1, KV, T, D], and their scales, float32
        [1, KV, T].
    """
    query, key, value, *others = inputs
    past_key, past_value, past_key_scale, past_value_scale, last_index, buffer, *tables = (
        other for other in others if other is not None
    )
    assert query is not None
    place = _Place(ops, query, past_key, last_index, buffer)
    if key is None or value is None:
        kv_width = ops.op("Mul", place.kv_heads, ops.constant([head_size], "int64"))
        rest = ops.op("Sub", ops.op("Shape", query, start=2, end=3), ops.op("Add", kv_width, kv_width))
        sizes = ops.op("Concat", rest, kv_width, kv_width, axis=0)
        query, key, value = ops.multi("Split", query, sizes, outputs=(True, True, True), axis=2)

    def by_head(x: ir.Value) -> ir.Value:
        return ops.op("Reshape", x, ops.constant([0, 0, -1, head_size], "int64"))  # [1, S, heads, D]

    def side_by_side(x: ir.Value) -> ir.Value:
        return ops.op("Reshape", x, ops.constant([0, 0, -1], "int64"))

    interleaved = _named("interleaved", settings["rotary_interleaved"])

    def turned(x: ir.Value) -> ir.Value:
        """Apply rotary embedding, and multiply by the Hadamard matrix, float32 [1, S, heads, D]."""
        if tables:
            x = ops.op("RotaryEmbedding", x, place.positions, *tables, domain=MICROSOFT, interleaved=interleaved)
        return ops.op("MatMul", ops.cast(by_head(x), "float32"), ops.constant(hadamard(head_size), "float32"))

    def in_dtype(x: ir.Value) -> ir.Value:
        return ops.op("CastLike", x, query)

    keys, key_scales = _quantised(ops, turned(key))
    values, value_scales = _quantised(ops, ops.cast(by_head(value), "float32"))
    attended, *_ = group_query_attention(
        ops,
        [
            side_by_side(in_dtype(turned(query))),
            side_by_side(in_dtype(_dequantised(ops, keys, key_scales))),
            side_by_side(in_dtype(_dequantised(ops, values, value_scales))),
            in_dtype(place.stored(past_key, past_key_scale)),
            in_dtype(place.stored(past_value, past_value_scale)),
            last_index,
            place.end,
        ],
        **{name: settings[name] for name in PASSED_ON if name in settings},
    )
    return [
        attended,
        place.appended(past_key, keys),
        place.appended(past_value, values),
        place.appended(past_key_scale, key_scales, scales=True),
        place.appended(past_value_scale, value_scales, scales=True),
    ]


def _named(name: str, value: Attribute) -> Attribute:
    """Rename a reference to an attribute of the function."""
    return ir.RefAttr(name, str(value.ref_attr_name), value.type) if isinstance(value, ir.Attr) else value


def _quantised(ops: Ops, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Round x [1, S, KV, D] to codes, int8, and scales, float32 [1, S, KV, 1]."""
    last = ops.constant([-1], "int64")
    largest = ops.op("ReduceMax", ops.op("Abs", x), last, keepdims=1)
    spoiled = ops.op("ReduceSum", ops.op("Sub", x, x), last, keepdims=1)  # NaN where x is not finite, otherwise 0
    scale = ops.op("Add", ops.op("Div", largest, ops.constant(LARGEST_CODE, "float32")), spoiled)
    one = ops.constant(1.0, "float32")
    divisor = ops.op("Where", ops.op("Greater", scale, ops.constant(0.0, "float32")), scale, one)
    rounded = ops.op("Round", ops.op("Div", x, divisor))
    clipped = ops.op("Clip", rounded, ops.constant(-LARGEST_CODE, "float32"), ops.constant(LARGEST_CODE, "float32"))
    return ops.cast(clipped, "int8"), scale


def _dequantised(ops: Ops, codes: ir.Value, scales: ir.Value) -> ir.Value:
    return ops.op("Mul", ops.cast(codes, "float32"), scales)


class _Place:
    """The places of a call's tokens in the cache: lengths as in `attention.Lengths`, P from the past's shape."""

    def __init__(self, ops: Ops, query: ir.Value, past: ir.Value, last_index: ir.Value, buffer: ir.Value) -> None:
        self._ops = ops
        self._slices: dict[ir.Value, ir.Value] = {}
        zero, axis = ops.constant([0], "int64"), ops.constant([0], "int64")
        tokens = ops.op("Shape", query, start=1, end=2)
        length = ops.op("Unsqueeze", ops.cast(buffer, "int64"), axis)
        total = ops.op("Add", ops.cast(last_index, "int64"), ops.constant([1], "int64"))
        self._past = ops.op("Where", ops.op("Equal", tokens, length), zero, ops.op("Sub", total, tokens))  # int64 [1]
        end = ops.op("Add", self._past, tokens)
        # int32 scalar: tokens of past and call, and padding. GroupQueryAttention on CUDA takes 0 for one that is in the
        # GPU's memory; what comes from shapes is in the CPU's.
        held = ops.op("Shape", self._held(past), start=2, end=3)
        self.end = ops.cast(ops.op("Squeeze", ops.op("Add", held, tokens), axis), "int32")
        steps = ops.op("Range", ops.constant(0, "int64"), ops.op("Squeeze", tokens, axis), ops.constant(1, "int64"))
        self.positions = ops.op("Unsqueeze", ops.op("Add", steps, self._past), axis)  # int64 [1, S]
        self.kv_heads = ops.op("Shape", past, start=1, end=2)  # int64 [1]
        room = ops.op("Max", ops.op("Shape", past, start=2, end=3), length)
        self._behind = ops.op("Sub", room, end)

    def stored(self, codes: ir.Value, scales: ir.Value) -> ir.Value:
        """Return the past's keys or values, de-quantised, float32 [1, KV, past, D]."""
        ops = self._ops
        by_row = ops.op("Unsqueeze", self._held(scales), ops.constant([-1], "int64"))
        return _dequantised(ops, self._held(codes), by_row)

    def appended(self, past: ir.Value, new: ir.Value, *, scales: bool = False) -> ir.Value:
        """Append codes [1, S, KV, D] to the past's [1, KV, P, D], or scales [1, S, KV, 1] to the past's [1, KV, P].

        Returns:
            A tensor like the past's, with T in place of P, and zeros after the call's tokens.
        """
        ops = self._ops
        rows = ops.op("Transpose", new, perm=[0, 2, 1, 3])  # [1, KV, S, N]
        if scales:
            rows = ops.op("Squeeze", rows, ops.constant([3], "int64"))
        before, after = ops.op("Shape", rows, end=2), ops.op("Shape", rows, start=3)
        shape = ops.op("Concat", before, self._behind, after, axis=0)
        zeros = ops.op("ConstantOfShape", shape, value=ir.tensor(np.zeros(1, np.float32 if scales else np.int8)))
        return ops.op("Concat", self._held(past), rows, zeros, axis=2)

    def _held(self, past: ir.Value) -> ir.Value:
        ops = self._ops
        if past not in self._slices:
            zero, axis = ops.constant([0], "int64"), ops.constant([2], "int64")
            self._slices[past] = ops.op("Slice", past, zero, self._past, axis)
        return self._slices[past]
