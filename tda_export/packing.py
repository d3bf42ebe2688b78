"""Which linears of a layer are stored as one matrix, and so share a threshold.

A part is one linear of a layer: q, k, v, o and the FFN's. A site is the parts that read the same input. `separate`
stores every part by itself. `sites` stores the parts of a site side by side, so that a row (the weights of one input
channel) is long enough in small models to be worth a separate read.

The head is a linear outside the layers, always stored by itself. Where its rows have prices, it is the part `head` of
one layer, 0, in all that goes by part or matrix: prices, densities, bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from tda_export.errors import UsageError
from tda_export.weights.formats import IntegerFormat
from tda_export.weights.plan import FLOAT, HEAD, FormatPlan, part_name

if TYPE_CHECKING:
    from tda_export.models.spec import DecoderSpec

Packing = Literal["separate", "sites"]
PACKINGS: tuple[Packing, ...] = get_args(Packing)
THRESHOLDS: dict[Packing, str] = {"separate": "one threshold a matrix", "sites": "one threshold a site"}  # for readers

ATTENTION_PARTS = ("q", "k", "v", "o")
Parts = Literal["all", "layers", "ffn", "attention"]  # the parts whose rows may be dropped; layers: all but the head
HeadRows = Literal["priced", "whole"]  # whether a token reads the rows of the head that are worth it, or all
SAFE_BITS = 8  # codes of so many bits may be rounded a second time


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
    """Name the matrices of a layer's FFN, attention or both with their parts."""
    attention = {"all": (True, False), "layers": (True, False), "ffn": (False,), "attention": (True,)}[parts]
    stored = packed_matrices(spec, packing)
    return {name: members for name, members in stored.items() if (members[0] in ATTENTION_PARTS) in attention}


def can_read_head(rows: HeadRows, stored: FormatPlan | None) -> bool:
    """Return whether a token can read the head in this way, given the formats of a checkpoint of codes, None for
    floats.

    Rows with prices lie by input channel, and a head that is read whole by output. Codes that lie the other way are
    rounded again, which those of four bits would not stand.
    """
    format = None if stored is None else stored.of(HEAD)
    if stored is None or not isinstance(format, IntegerFormat) or format.bits >= SAFE_BITS:
        return True
    return stored.head_major == ("input" if rows == "priced" else "output")


def chosen_head(wanted: HeadRows | None, stored: FormatPlan | None, name: str) -> HeadRows:
    """Return how tokens read the head: as it is wanted, or by default with prices where that is possible.

    Args:
        wanted: The choice, None for the default.
        stored: The formats of a checkpoint of codes, None for floats.
        name: The model's name, for the message.

    Raises:
        UsageError: The checkpoint's codes cannot be read so.
    """
    if wanted is None:
        return "priced" if can_read_head("priced", stored) else "whole"
    if can_read_head(wanted, stored):
        return wanted
    lies, needed = ("output", "input") if wanted == "priced" else ("input", "output")
    raise UsageError(
        f"--head {wanted}: {name} has its head in four bits by {lies}, and it would have to lie by {needed}. Leave it "
        f"out, or quantise with --head {wanted}."
    )


def linear_shape(spec: DecoderSpec, part: str) -> tuple[int, int]:
    """Return the input channels and the outputs of a linear of a layer, or of the head."""
    if part == HEAD:
        return spec.embedding_width, spec.vocab_size
    hidden, ffn = spec.hidden_size, spec.ffn_size
    heads, kv_heads = spec.num_heads * spec.head_size, spec.num_kv_heads * spec.head_size
    shapes = {"q": (hidden, heads), "k": (hidden, kv_heads), "v": (hidden, kv_heads), "o": (heads, hidden)}
    return (shapes | {"gate": (hidden, ffn), "up": (hidden, ffn), "down": (ffn, hidden)})[part]


def linear_elements(spec: DecoderSpec) -> int:
    """Return the elements of all linears of a layer."""
    return sum(math.prod(linear_shape(spec, part)) for part in linear_parts(spec))


@dataclass(frozen=True)
class RowBytes:
    """How many bytes the rows of linears with prices take.

    `element_bytes`: bytes of a float. `formats`: the format of every linear by `part_name`, and of the head where its
    rows have prices, None for floats; empty where all are floats.
    """

    element_bytes: int
    formats: Mapping[str, IntegerFormat | None] = field(default_factory=dict)

    @property
    def integers(self) -> dict[str, IntegerFormat]:
        """The linears that are integers, with their formats."""
        return {name: format for name, format in self.formats.items() if format is not None}

    @property
    def has_floats(self) -> bool:
        """Whether some linear is a float."""
        return len(self.integers) < len(self.formats) or not self.formats

    @property
    def label(self) -> str:
        """A name that identifies the formats: the name of the format where the layers' linears share it (`float`,
        `int4_g32`), otherwise one with a hash of all formats; then `+` and the format of a head that has another
        one."""
        linears = {name: format.name for name, format in self.integers.items() if name != HEAD}
        found = set(linears.values())
        if not found:
            label = FLOAT
        elif len(found) == 1 and len(linears) == len(self.formats.keys() - {HEAD}):
            label = found.pop()
        else:
            label = f"mixed-{hashlib.sha256(repr(sorted(linears.items())).encode()).hexdigest()[:16]}"
        head = FLOAT if self.formats.get(HEAD) is None else self.integers[HEAD].name
        return label if HEAD not in self.formats or head == label else f"{label}+{head}"

    def suits(self, spec: DecoderSpec, packing: Packing) -> bool:
        """Return whether all parts that this packing stores side by side have one format, and no group spans two
        parts."""
        return all(
            self._fit(spec, layer, parts)
            for layer in range(spec.num_layers)
            for parts in packed_matrices(spec, packing).values()
        )

    def _fit(self, spec: DecoderSpec, layer: int, parts: Sequence[str]) -> bool:
        formats = {self.formats.get(part_name(layer, part)) for part in parts}
        format = formats.pop()
        if formats or format is None:
            return not formats
        return all(linear_shape(spec, part)[1] % format.group == 0 for part in parts[:-1])

    def of(self, layer: int, parts: Sequence[str], outputs: Mapping[str, int]) -> int:
        """Return the bytes of a row of the matrix that stores these parts of a layer side by side.

        Args:
            layer: The layer's number.
            parts: The parts, all of one format.
            outputs: The number of outputs of each part.
        """
        columns = sum(outputs[part] for part in parts)
        format = self.formats.get(HEAD if parts[0] == HEAD else part_name(layer, parts[0]))
        return columns * self.element_bytes if format is None else format.row_bytes(columns)


def row_bytes_of(spec: DecoderSpec, element_bytes: int, plan: FormatPlan | None, *, head: bool = False) -> RowBytes:
    """Return the bytes of rows under a plan of formats; None means all floats.

    `head` says whether the head's rows have prices too.
    """
    integers = {} if plan is None else plan.integers
    format = None if plan is None else plan.of(HEAD)
    if head and isinstance(format, IntegerFormat):
        integers = {**integers, HEAD: format}  # a tied one has no name of its own in the plan
    parts = (*linear_parts(spec), HEAD) if head else linear_parts(spec)
    return row_bytes_from(spec.num_layers, parts, element_bytes, integers)


def row_bytes_from(
    layers: int, parts: Sequence[str], element_bytes: int, integers: Mapping[str, IntegerFormat]
) -> RowBytes:
    """Return the bytes of rows of these parts, the head among them where its rows have prices.

    `integers` are the integer linears by `part_name`, and the head; other names are ignored.
    """
    names = [part_name(layer, part) for layer in range(layers) for part in parts if part != HEAD]
    names += [HEAD] if HEAD in parts else []
    return RowBytes(element_bytes, {name: integers.get(name) for name in names})


def linear_outputs(spec: DecoderSpec) -> dict[str, int]:
    """Return the outputs of each part, and of the head."""
    return {part: linear_shape(spec, part)[1] for part in (*linear_parts(spec), HEAD)}
