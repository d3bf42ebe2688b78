"""Which linears of a layer are stored as one matrix, and so share a threshold.

A part is one linear of a layer: q, k, v, o and the FFN's. A site is the parts that read the same input. `separate`
stores every part by itself; `sites` stores the parts of a site side by side, so that a row, what leaves an input
channel, is long enough to be worth a read of its own in small models.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from tda_export.weights.formats import IntegerFormat, WeightFormat
from tda_export.weights.plan import part_name

if TYPE_CHECKING:
    from tda_export.models.spec import DecoderSpec

Packing = Literal["separate", "sites"]
PACKINGS: tuple[Packing, ...] = get_args(Packing)
THRESHOLDS: dict[Packing, str] = {"separate": "one threshold a matrix", "sites": "one threshold a site"}  # for readers

FormatOf = Callable[[str], WeightFormat | None]
FLOAT = "float"  # the label of formats where all are floats
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


@dataclass(frozen=True)
class RowBytes:
    """What rows of the layers' linears take.

    `element_bytes`: of floats. `formats`: of the linears that are integers, by `part_name`.
    """

    element_bytes: int
    formats: Mapping[str, IntegerFormat] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """A name that tells formats apart: `float`, that of the one format, or one with a hash of them all."""
        found = {format.name for format in self.formats.values()}
        if not found:
            return FLOAT
        parts = {tuple(name.split(".")[::2]) for name in self.formats}
        if len(found) == 1 and {*ATTENTION_PARTS, "up", "down"} <= {part for _, part in parts}:
            return found.pop()
        named = sorted((name, format.name) for name, format in self.formats.items())
        return f"mixed-{hashlib.sha256(repr(named).encode()).hexdigest()[:16]}"

    def suits(self, spec: DecoderSpec, packing: Packing) -> bool:
        """Tell whether all that this packing puts side by side has one format."""
        return all(
            len({self.formats.get(part_name(layer, part)) for part in parts}) == 1
            for layer in range(spec.num_layers)
            for parts in packed_matrices(spec, packing).values()
        )

    def of(self, layer: int, parts: Sequence[str], outputs: Mapping[str, int]) -> int:
        """Return the bytes of a row of the matrix that these parts of a layer lie side by side in.

        Args:
            layer: Its number.
            parts: Of one format.
            outputs: Of each part.
        """
        columns = sum(outputs[part] for part in parts)
        format = self.formats.get(part_name(layer, parts[0]))
        return columns * self.element_bytes if format is None else format.row_bytes(columns)


def row_bytes_of(spec: DecoderSpec, element_bytes: int, format_of: FormatOf) -> RowBytes:
    """Return what rows take, given the format of each linear by `part_name`; None is a float."""
    names = [part_name(layer, part) for layer in range(spec.num_layers) for part in linear_parts(spec)]
    formats = {name: found for name in names if isinstance(found := format_of(name), IntegerFormat)}
    return RowBytes(element_bytes, formats)


def linear_outputs(spec: DecoderSpec) -> dict[str, int]:
    """Return the outputs of each part."""
    return {part: linear_shape(spec, part)[1] for part in linear_parts(spec)}
