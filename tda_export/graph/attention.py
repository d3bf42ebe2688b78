"""The attention half of a layer, from queries, keys and values to ONNX Runtime's GroupQueryAttention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from tda_export.graph import contract
from tda_export.graph.ops import MICROSOFT, Ops
from tda_export.graph.weights_file import WeightTable
from tda_export.models.spec import DecoderSpec

Norm = Callable[[ir.Value, str], ir.Value]  # (x [.., N], name of a weight [N]) -> [.., N]
# (inputs of a function of attention, attributes) -> attention's output [1, S, H D], and the present caches
Attend = Callable[[Sequence[ir.Value | None], dict[str, float]], list[ir.Value]]


@dataclass(frozen=True)
class Lengths:
    """The lengths that attention needs, computed once per graph."""

    total: ir.Value  # int64 [1]: the tokens of past and call together
    buffer: ir.Value  # int64 [1]: T, the length of the attention mask
    last_index: ir.Value  # int32 [1]: total - 1, GroupQueryAttention's seqlens_k
    buffer_scalar: ir.Value  # int32 scalar: T, GroupQueryAttention's total_sequence_length


@dataclass(frozen=True)
class CallTokens:
    """How many of a call's S tokens are attended to, and which count for statistics."""

    attended: ir.Value  # int64 [1]: how many are not padding
    counted: ir.Value  # bool [S]: those that count for statistics (not the sequence's first, not padding)


def attention_lengths(ops: Ops, attention_mask: ir.Value) -> Lengths:
    """Compute lengths from `attention_mask` [1, T]: its row sum is the total, and T may exceed it (fixed buffers)."""
    return buffer_lengths(ops, attention_mask, *total_length(ops, attention_mask))


def total_length(ops: Ops, attention_mask: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Count the tokens of past and call: the number, int64 [1], and the index of the last one, int32 [1]."""
    total = ops.op("ReduceSum", attention_mask, ops.constant([1], "int64"), keepdims=0)  # int64 [1]
    return total, ops.cast(ops.op("Sub", total, ops.constant([1], "int64")), "int32")


def buffer_lengths(ops: Ops, attention_mask: ir.Value, total: ir.Value, last_index: ir.Value) -> Lengths:
    """Add the length of the attention mask to the two results of `total_length`."""
    buffer = ops.op("Shape", attention_mask, start=1, end=2)  # int64 [1]
    return Lengths(
        total=total,
        buffer=buffer,
        last_index=last_index,
        buffer_scalar=ops.cast(ops.op("Squeeze", buffer, ops.constant([0], "int64")), "int32"),
    )


def call_tokens(ops: Ops, input_ids: ir.Value, lengths: Lengths) -> CallTokens:
    """Find which tokens of a call, `input_ids` [1, S], are padding and which count for statistics.

    The past's length is 0 when S = T and the total minus S otherwise; the KV buffer's shape does not determine it.
    """
    length = ops.op("Shape", input_ids, start=1, end=2)  # int64 [1]: S
    past = ops.op(
        "Where",
        ops.op("Equal", length, lengths.buffer),
        ops.constant([0], "int64"),
        ops.op("Sub", lengths.total, length),
    )  # int64 [1]
    scalar_length = ops.op("Squeeze", length, ops.constant([0], "int64"))
    steps = ops.op("Range", ops.constant(0, "int64"), scalar_length, ops.constant(1, "int64"))
    positions = ops.op("Add", steps, past)  # int64 [S]
    after_first = ops.op("Greater", positions, ops.constant([0], "int64"))
    return CallTokens(
        attended=ops.op("Sub", lengths.total, past),
        counted=ops.op("And", after_first, ops.op("Less", positions, lengths.total)),
    )


def call_positions(ops: Ops, input_ids: ir.Value, lengths: Lengths) -> ir.Value:
    """Compute the positions of a call's tokens, int64 [1, S], without shapes, which a captured graph would fix.

    The past's length is the total minus S, or 0 where padding makes the total less than S.
    """
    ones = ops.op("Add", ops.op("Mul", input_ids, ops.constant(0, "int64")), ops.constant(1, "int64"))  # [1, S]
    length = ops.op("ReduceSum", ones, ops.constant([1], "int64"), keepdims=0)  # int64 [1]
    past = ops.op("Max", ops.op("Sub", lengths.total, length), ops.constant([0], "int64"))  # int64 [1]
    steps = ops.op("CumSum", ones, ops.constant(1, "int64"), exclusive=1)  # 0, 1, .. [1, S]
    return ops.op("Add", steps, past)


def attention(
    ops: Ops,
    spec: DecoderSpec,
    weights: WeightTable,
    layer: int,
    projected: Sequence[ir.Value],
    past: Sequence[ir.Value],
    lengths: Lengths,
    norm: Norm,
    attend: Attend,
) -> list[ir.Value]:
    """Compute attention from queries, keys and values.

    Args:
        ops: The graph.
        spec: The architecture.
        weights: The tensors of weights.bin.
        layer: The layer's number.
        projected: Q, K and V side by side [1, S, (H + 2 KV) D], or [1, S, H D], [1, S, KV D] twice.
        past: Past keys and values, as `contract.layer_caches` lists them.
        lengths: The lengths of past and call.
        norm: Applies an RMS norm over the last axis.
        attend: Adds the nodes of attention.

    Returns:
        The input of the output projection, [1, S, H D], and the present caches.
    """
    inputs: list[ir.Value | None] = [*projected, *[None] * (3 - len(projected))]
    if spec.qk_norm != "none":
        inputs = _normed(ops, spec, layer, projected, norm)
    rope = spec.layer_rope(layer)
    caches = contract.LOCAL_ROPE_CACHES if rope is not None and rope is spec.local_rope else contract.ROPE_CACHES
    tables = [] if rope is None else [ops.weight(weights[name]) for name in caches]
    settings: dict[str, float] = {
        "num_heads": spec.num_heads,
        "kv_num_heads": spec.num_kv_heads,
        "local_window_size": spec.sliding_windows[layer] or -1,
        "do_rotary": int(rope is not None),
        "rotary_interleaved": 0,
    }
    if spec.attention_scale is not None:
        settings["scale"] = spec.attention_scale
    if spec.attention_softcap is not None:
        settings["softcap"] = spec.attention_softcap
    return attend([*inputs, *past, lengths.last_index, lengths.buffer_scalar, *tables], settings)


def group_query_attention(ops: Ops, inputs: Sequence[ir.Value | None], **settings: Any) -> list[ir.Value]:
    """Add ONNX Runtime's GroupQueryAttention; return its output, present keys and present values."""
    return ops.multi("GroupQueryAttention", *inputs, outputs=(True, True, True), domain=MICROSOFT, **settings)


def _normed(
    ops: Ops, spec: DecoderSpec, layer: int, projected: Sequence[ir.Value], norm: Norm
) -> list[ir.Value | None]:
    """Split Q, K and V, and normalise Q and K: [1, S, H D], [1, S, KV D] twice."""
    sizes = [spec.num_heads * spec.head_size, *[spec.num_kv_heads * spec.head_size] * 2]
    if len(projected) == 1:
        projected = ops.multi("Split", *projected, ops.constant(sizes, "int64"), outputs=(True, True, True), axis=2)
    query, key, value = projected

    def normed(rows: ir.Value, heads: int, weight: str) -> ir.Value:
        if spec.qk_norm == "whole":
            return norm(rows, weight)
        by_head = ops.op("Reshape", rows, ops.constant([1, -1, heads, spec.head_size], "int64"))
        return ops.op("Reshape", norm(by_head, weight), ops.constant([1, -1, heads * spec.head_size], "int64"))

    query = normed(query, spec.num_heads, contract.query_norm(layer))
    return [query, normed(key, spec.num_kv_heads, contract.key_norm(layer)), value]
