"""Attention to a cache that stores keys and values in a format of its own (`cache_formats`), in ONNX Runtime's own
operators: the body of `tda::Attention8` and `tda::Attention16`, also used in prefill.

Keys are stored after rotary embedding. Tokens attend to what is stored, also of their own call, so the result does not
depend on how tokens are split into calls. What is stored of the past is passed on unchanged.

In half precision the format is computed in float32, and GroupQueryAttention reads half precision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from tda_export.graph.attention import group_query_attention
from tda_export.graph.cache_formats import CacheFormat
from tda_export.graph.kv_formats import CacheTensorKind
from tda_export.graph.ops import MICROSOFT, Ops

# GroupQueryAttention's attributes that the body passes on.
PASSED_ON = ("num_heads", "kv_num_heads", "local_window_size", "scale", "softcap")
Attribute = float | ir.Attr


def stored_attention(
    ops: Ops, format: CacheFormat, inputs: Sequence[ir.Value | None], head_size: int, settings: Mapping[str, Attribute]
) -> list[ir.Value]:
    """Add the nodes.

    Args:
        ops: The graph or function body.
        format: How the cache stores keys and values.
        inputs: In the order of `format.inputs`; queries, keys, values and tables in one dtype.
        head_size: D.
        settings: The attributes of the operator, as numbers or as references to the function's attributes.

    Returns:
        Attention's output [1, S, H D], and the present caches, [1, KV, T, ..].
    """
    query, key, value, *others = inputs
    given = [other for other in others if other is not None]
    caches = 2 * len(format.kinds)
    past, (last_index, buffer, *tables) = given[:caches], given[caches:]
    past_keys, past_values = past[::2], past[1::2]
    assert query is not None
    place = _Place(ops, query, past[0], last_index, buffer)
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

    def placed(x: ir.Value) -> ir.Value:
        """Apply rotary embedding and what the format asks for, float32 [1, S, heads, D]."""
        if tables:
            x = ops.op("RotaryEmbedding", x, place.positions, *tables, domain=MICROSOFT, interleaved=interleaved)
        return format.spread(ops, by_head(x), head_size)

    def in_dtype(x: ir.Value) -> ir.Value:
        return ops.op("CastLike", x, query)

    keys, values = format.stored(ops, placed(key)), format.stored(ops, ops.cast(by_head(value), "float32"))
    attended, *_ = group_query_attention(
        ops,
        [
            side_by_side(in_dtype(placed(query))),
            side_by_side(in_dtype(format.read(ops, keys))),
            side_by_side(in_dtype(format.read(ops, values))),
            in_dtype(format.read(ops, place.held(past_keys))),
            in_dtype(format.read(ops, place.held(past_values))),
            last_index,
            place.end,
        ],
        **{name: settings[name] for name in PASSED_ON if name in settings},
    )
    present: list[ir.Value] = []
    for kind, *tensors in zip(format.kinds, past_keys, keys, past_values, values, strict=True):
        present += [place.appended(kind, *pair) for pair in (tensors[:2], tensors[2:])]
    return [attended, *present]


def _named(name: str, value: Attribute) -> Attribute:
    """Rename a reference to an attribute of the function."""
    return ir.RefAttr(name, str(value.ref_attr_name), value.type) if isinstance(value, ir.Attr) else value


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

    def held(self, past: Sequence[ir.Value]) -> list[ir.Value]:
        """Return what is stored of the past's keys or values: [1, KV, past, D], and numbers [1, KV, past, 1]."""
        rows, *numbers = (self._held(tensor) for tensor in past)
        return [rows, *(self._ops.op("Unsqueeze", each, self._ops.constant([-1], "int64")) for each in numbers)]

    def appended(self, kind: CacheTensorKind, past: ir.Value, new: ir.Value) -> ir.Value:
        """Append rows [1, S, KV, D] to the past's [1, KV, P, D], or numbers [1, S, KV, 1] to the past's [1, KV, P].

        Returns:
            A tensor like the past's, with T in place of P, and zeros after the call's tokens.
        """
        ops = self._ops
        rows = ops.op("Transpose", new, perm=[0, 2, 1, 3])  # [1, KV, S, N]
        if not kind.row:
            rows = ops.op("Squeeze", rows, ops.constant([3], "int64"))
        before, after = ops.op("Shape", rows, end=2), ops.op("Shape", rows, start=3)
        shape = ops.op("Concat", before, self._behind, after, axis=0)
        zeros = ops.op("ConstantOfShape", shape, value=ir.tensor(np.zeros(1, kind.dtype)))
        return ops.op("Concat", self._held(past), rows, zeros, axis=2)

    def _held(self, past: ir.Value) -> ir.Value:
        ops = self._ops
        if past not in self._slices:
            zero, axis = ops.constant([0], "int64"), ops.constant([2], "int64")
            self._slices[past] = ops.op("Slice", past, zero, self._past, axis)
        return self._slices[past]
