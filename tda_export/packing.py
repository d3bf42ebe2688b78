"""Which linears of a layer are stored as one matrix, and so share a threshold.

A part is one linear of a layer: q, k, v, o and the FFN's. A site is the parts that read the same input. `separate`
stores every part by itself; `sites` stores the parts of a site side by side, so that a row, what leaves an input
channel, is long enough to be worth a read of its own in small models.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from tda_export.models.spec import DecoderSpec

Packing = Literal["separate", "sites"]
PACKINGS: tuple[Packing, ...] = get_args(Packing)
THRESHOLDS: dict[Packing, str] = {"separate": "one threshold a matrix", "sites": "one threshold a site"}  # for readers

ATTENTION_PARTS = ("q", "k", "v", "o")
Parts = Literal["all", "ffn", "attention"]  # whose rows may be dropped


def linear_parts(spec: DecoderSpec) -> tuple[str, ...]:
    """Name the linears of a layer: attention's, then the FFN's."""
    return (*ATTENTION_PARTS, *spec.ffn_parts)


def linear_sites(spec: DecoderSpec) -> dict[str, tuple[str, ...]]:
    """Name the sites of a layer with their parts; a site of one part has the part's name."""
    return sites_of(linear_parts(spec))


def sites_of(parts: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Name the sites of a layer that has these parts."""
    first = {"gate_up": ("gate", "up")} if "gate" in parts else {"up": ("up",)}
    return {"qkv": ("q", "k", "v"), "o": ("o",), **first, "down": ("down",)}


def packed_matrices(spec: DecoderSpec, packing: Packing) -> dict[str, tuple[str, ...]]:
    """Name the matrices of a layer with their parts."""
    return linear_sites(spec) if packing == "sites" else {part: (part,) for part in linear_parts(spec)}


def droppable_matrices(spec: DecoderSpec, packing: Packing, parts: Parts) -> dict[str, tuple[str, ...]]:
    """Name the matrices of FFN, attention or both with their parts."""
    attention = {"all": (True, False), "ffn": (False,), "attention": (True,)}[parts]
    stored = packed_matrices(spec, packing)
    return {name: members for name, members in stored.items() if (members[0] in ATTENTION_PARTS) in attention}


def linear_shape(spec: DecoderSpec, part: str) -> tuple[int, int]:
    """Return the input channels and the outputs of a linear."""
    hidden, ffn = spec.hidden_size, spec.ffn_size
    heads, kv_heads = spec.num_heads * spec.head_size, spec.num_kv_heads * spec.head_size
    shapes = {"q": (hidden, heads), "k": (hidden, kv_heads), "v": (hidden, kv_heads), "o": (heads, hidden)}
    return (shapes | {"gate": (hidden, ffn), "up": (hidden, ffn), "down": (ffn, hidden)})[part]


def linear_elements(spec: DecoderSpec) -> int:
    """Return the elements of all linears of a layer."""
    return sum(math.prod(linear_shape(spec, part)) for part in linear_parts(spec))


def row_bytes(columns: int, element_bytes: int) -> int:
    """Return the bytes of a row, stored as floats."""
    return columns * element_bytes


def matrix_row_bytes(spec: DecoderSpec, parts: tuple[str, ...], element_bytes: int) -> int:
    """Return the bytes of a row of the matrix that packs these parts."""
    return row_bytes(sum(linear_shape(spec, part)[1] for part in parts), element_bytes)
