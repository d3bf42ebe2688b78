"""The linear layers of a decoder, and which of them a priced artifact stores as one matrix.

A part is a linear of the architecture. A site is a place in a layer whose linears have the same input: its parts may be
stored side by side, as one matrix whose rows are read or skipped together.
"""

from __future__ import annotations

from typing import Literal

Packing = Literal["separate", "sites"]  # one matrix a part, or one a site

SITES: dict[str, tuple[str, ...]] = {
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}
ATTENTION_PARTS = ("q", "k", "v", "o")


def stored_linears(ffn_parts: tuple[str, ...], packing: Packing) -> dict[str, tuple[str, ...]]:
    """Return what a layer stores: names of matrices, and the parts that lie side by side in each.

    Args:
        ffn_parts: Of the architecture, gates first: gate, up, down, or up, down.
        packing: Of the artifact.
    """
    present = {*ATTENTION_PARTS, *ffn_parts}
    stored: dict[str, tuple[str, ...]] = {}
    for site, parts in SITES.items():
        parts = tuple(part for part in parts if part in present)
        if packing == "sites" and len(parts) > 1:
            stored[site] = parts
        else:
            stored |= {part: (part,) for part in parts}
    return stored
