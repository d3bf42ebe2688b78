"""Which format each matrix of a model is stored in, decided once, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from tda_export.errors import UsageError, shown
from tda_export.weights.formats import (
    DEFAULT_GROUP,
    GROUPS,
    INTEGER_FORMATS,
    IntegerFormat,
    WeightFormat,
    integer_format,
)
from tda_export.weights.matrix import Major

EMBEDDING, HEAD = "embedding", "head"
FLOAT = "float"  # not a format's name: elements stay in the float dtype of the output
BITS = {"int4": 4, "int8": 8}
OUTSIDE_BITS = 8  # bits of embedding and head, unless a rule says otherwise

Rule = tuple[str, WeightFormat | None]  # a pattern of names, and the format of the matrices that it matches


def part_name(layer: int, part: str) -> str:
    """Return the name of one linear of a layer (q, k, v, o, gate, up, down), as patterns and folders spell it."""
    return f"layers.{layer}.{part}"


def matrix_names(layers: int, parts: tuple[str, ...], *, tied_head: bool) -> list[str]:
    """Name all matrices of a model. A tied head is the embedding, one matrix of that name."""
    linears = [part_name(layer, part) for layer in range(layers) for part in parts]
    return [*linears, EMBEDDING] if tied_head else [*linears, EMBEDDING, HEAD]


@dataclass(frozen=True)
class FormatPlan:
    """The format of every matrix by name, None for floats.

    `head_major` says what a row of a head of integers is: an input, as in the layers' linears, or an output (a token).
    """

    formats: Mapping[str, WeightFormat | None]
    head_major: Major = "output"

    def of(self, name: str) -> WeightFormat | None:
        """Return the format of `layers.{i}.{part}`, `embedding` or `head`. A tied head has the embedding's format.

        Raises:
            KeyError: There is no such matrix.
        """
        return self.formats[EMBEDDING if name == HEAD and name not in self.formats else name]

    @property
    def integers(self) -> dict[str, IntegerFormat]:
        """Return the matrices that are stored as integers, with their formats."""
        return {name: format for name, format in self.formats.items() if isinstance(format, IntegerFormat)}

    @property
    def gptq_formats(self) -> frozenset[IntegerFormat]:
        """Return the formats of the matrices of integers whose rows are inputs: all but the embedding, and a head that
        lies by output."""
        outside = (EMBEDDING,) if self.head_major == "input" else (EMBEDDING, HEAD)
        return frozenset(format for name, format in self.integers.items() if name not in outside)

    def to_dict(self) -> dict[str, str]:
        """Return the formats as plain data."""
        return {name: FLOAT if format is None else format.name for name, format in self.formats.items()}

    @staticmethod
    def from_dict(content: Mapping[str, str], head_major: Major = "output") -> FormatPlan:
        """Read a plan back from the result of `to_dict`.

        Raises:
            ValueError: A format is unknown; the message names the matrix.
        """
        if not isinstance(content, Mapping):
            raise ValueError(f"formats are {shown(content)}, not names with formats")
        formats: dict[str, WeightFormat | None] = {}
        for name, format in content.items():
            if format != FLOAT and (not isinstance(format, str) or format not in INTEGER_FORMATS):
                raise ValueError(f"the format of {shown(name)} is {shown(format)}, which is not known")
            formats[name] = None if format == FLOAT else INTEGER_FORMATS[format]
        return FormatPlan(formats, head_major)


def plan_formats(
    layers: int,
    parts: tuple[str, ...],
    *,
    tied_head: bool,
    weights: str,
    group: int = DEFAULT_GROUP,
    rules: Iterable[Rule] = (),
    head_major: Major = "output",
) -> FormatPlan:
    """Choose the format of every matrix.

    Args:
        layers: The number of layers.
        parts: The linears of a layer (`packing.linear_parts`).
        tied_head: Whether head and embedding are one matrix. Rules for either then hold for it.
        weights: The format of the layers' linears: `int4`, `int8` or `float`. With integers, embedding and head are
            int8.
        group: The number of elements that share a scale, where a rule does not say otherwise.
        rules: Exceptions; the last that matches a name wins.
        head_major: What a row of the head is. By input, a tied head is a matrix with a format of its own, unless both
            it and the embedding stay floats.

    Raises:
        UsageError: A rule matches nothing.
    """
    rules = tuple(rules)
    if head_major == "input" and tied_head:
        apart = plan_formats(
            layers, parts, tied_head=False, weights=weights, group=group, rules=rules, head_major=head_major
        )
        if apart.of(HEAD) is not None or apart.of(EMBEDDING) is not None:
            return apart
    inside = read_format(weights, group)
    outside = None if inside is None else integer_format(OUTSIDE_BITS, group)
    formats: dict[str, WeightFormat | None] = {}
    for name in matrix_names(layers, parts, tied_head=tied_head):
        formats[name] = outside if name in (EMBEDDING, HEAD) else inside
    for pattern, format in rules:
        matched = [name for name in formats if fnmatchcase(name, pattern)]
        if tied_head and fnmatchcase(HEAD, pattern):
            matched.append(EMBEDDING)
        if not matched:
            last = part_name(layers - 1, parts[-1])
            raise UsageError(
                f"--weights-for: {shown(pattern)} matches no matrix. They are {part_name(0, parts[0])} to {last} "
                f"({', '.join(parts)} in each layer), {EMBEDDING} and {HEAD}."
            )
        formats |= dict.fromkeys(matched, format)
    by_input = head_major == "input" and not tied_head and formats[HEAD] is not None
    return FormatPlan(formats, "input" if by_input else "output")


def read_rules(texts: Iterable[str], group: int = DEFAULT_GROUP) -> tuple[Rule, ...]:
    """Read rules such as `layers.*.v=int8,head=int4_g64`: patterns, like those of file names, with formats.

    Raises:
        UsageError: A text is not a rule.
    """
    rules: list[Rule] = []
    for rule in (rule for text in texts for rule in text.split(",")):
        pattern, equals, format = (word.strip() for word in rule.partition("="))
        if not (pattern and equals and format):
            raise UsageError(
                f"--weights-for: {shown(rule)!r} is not PATTERN=FORMAT. Give rules such as 'layers.*.v=int8,head=int4'."
            )
        rules.append((pattern, read_format(format, group, option="--weights-for")))
    return tuple(rules)


def read_format(name: str, group: int = DEFAULT_GROUP, *, option: str = "--weights") -> WeightFormat | None:
    """Return the format of a name: `int4`, `int8`, either with its own group (`int4_g64`), or `float`, which is None.

    Raises:
        UsageError: It is not a format's name; the message names `option`.
    """
    if name == FLOAT:
        return None
    if name in BITS and group in GROUPS:
        return integer_format(BITS[name], group)
    if name in INTEGER_FORMATS:
        return INTEGER_FORMATS[name]
    if name in BITS:
        raise UsageError(f"A group of {group} is not known. Give {', '.join(map(str, GROUPS))}.")
    raise UsageError(
        f"{option}: {shown(name)} is not a format. Give {', '.join(BITS)} or {FLOAT}, "
        "with a group where needed (int4_g64)."
    )
