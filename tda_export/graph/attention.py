"""The attention half of a layer: packed projections and ONNX Runtime's GroupQueryAttention."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from tda_export.graph import contract
from tda_export.graph.ops import MICROSOFT, Ops
from tda_export.graph.weights_file import WeightTable
from tda_export.models.spec import DecoderSpec


@dataclass(frozen=True)
class Positions:
    """What the layers need to know about where the tokens stand, computed once a graph."""

    last_index: ir.Value  # int32 [1]: total length - 1, GroupQueryAttention's seqlens_k
    buffer_length: ir.Value  # int32 scalar: T, the length of the attention mask
    attended: ir.Value  # int64 [1]: how many of this call's S tokens are no padding
    counted: ir.Value  # bool [S]: tokens that count for statistics (not the sequence's first, not padding)


def token_positions(ops: Ops, input_ids: ir.Value, attention_mask: ir.Value) -> Positions:
    """Compute lengths and the counted tokens from `input_ids` [1, S] and `attention_mask` [1, T].

    The row sum of the mask is the total length; T may exceed it (fixed buffers). The past is 0 when S = T and the
    total minus S otherwise; the shape of the KV buffer says nothing.
    """
    total = ops.op("ReduceSum", attention_mask, ops.constant([1], "int64"), keepdims=0)  # int64 [1]
    length = ops.op("Shape", input_ids, start=1, end=2)  # int64 [1]: S
    buffer = ops.op("Shape", attention_mask, start=1, end=2)  # int64 [1]: T
    past = ops.op(
        "Where", ops.op("Equal", length, buffer), ops.constant([0], "int64"), ops.op("Sub", total, length)
    )  # int64 [1]
    scalar_length = ops.op("Squeeze", length, ops.constant([0], "int64"))
    steps = ops.op("Range", ops.constant(0, "int64"), scalar_length, ops.constant(1, "int64"))
    positions = ops.op("Add", steps, past)  # int64 [S]
    counted = ops.op("And", ops.op("Greater", positions, ops.constant([0], "int64")), ops.op("Less", positions, total))
    return Positions(
        last_index=ops.cast(ops.op("Sub", total, ops.constant([1], "int64")), "int32"),
        buffer_length=ops.cast(ops.op("Squeeze", buffer, ops.constant([0], "int64")), "int32"),
        attended=ops.op("Sub", total, past),
        counted=counted,
    )


def attention(
    ops: Ops,
    spec: DecoderSpec,
    weights: WeightTable,
    layer: int,
    x: ir.Value,
    past: tuple[ir.Value, ir.Value],
    positions: Positions,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Attend from x [1, S, M], already normalised.

    Returns:
        The output [1, S, M] without the output bias (the next norm adds it), and the present key and value.
    """
    qkv = ops.op("MatMul", x, ops.weight(weights[contract.qkv_weight(layer)]))  # [1, S, (H + 2 KV) D]
    if spec.qkv_bias:
        qkv = ops.op("Add", qkv, ops.weight(weights[contract.qkv_bias(layer)]))
    attended, present_key, present_value = ops.multi(
        "GroupQueryAttention",
        qkv,
        None,
        None,
        *past,
        positions.last_index,
        positions.buffer_length,
        ops.weight(weights[contract.COS_CACHE]),
        ops.weight(weights[contract.SIN_CACHE]),
        outputs=(True, True, True),
        domain=MICROSOFT,
        num_heads=spec.num_heads,
        kv_num_heads=spec.num_kv_heads,
        local_window_size=spec.sliding_windows[layer] or -1,
        do_rotary=1,
        rotary_interleaved=0,
    )
    output = ops.op("MatMul", attended, ops.weight(weights[contract.attention_out_weight(layer)]))  # [1, S, M]
    return output, present_key, present_value
