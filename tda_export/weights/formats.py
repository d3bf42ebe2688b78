"""How the elements of a matrix are stored. A float is a format like any other.

Integers are unsigned codes in groups along a row: element = (code - zero point) * scale, with the zero point and scale
of its group. No group spans two rows, so each row can be read or skipped by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

SCALES, ZERO_POINTS = "scales", "zero_points"
GROUPS = (32, 64, 128)
DEFAULT_GROUP = 32


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of weights.bin that a matrix is stored in."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class WeightFormat:
    """A way of storing numbers. `name` is its name in a manifest, `bits` the bits of one element."""

    name: str
    bits: int

    @property
    def is_float(self) -> bool:
        return True

    def tensors(self, name: str, rows: int, columns: int) -> tuple[StoredTensor, ...]:
        """List the tensors of a matrix [rows, columns]. The first has the matrix's name. All have as many rows as the
        matrix."""
        return (StoredTensor(name, (rows, columns), self.name),)

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of a row of `columns` elements."""
        return packed_bytes(columns, self.bits)


@dataclass(frozen=True)
class IntegerFormat(WeightFormat):
    """Codes of 4 or 8 bits, with a float16 scale and a zero point of the same number of bits for each `group` elements
    of a row.

    Codes are packed in order, the first one of a byte in its low bits. The last group of a row may be short. Tensors:
    codes uint8 [rows, bytes], scales float16 [rows, groups], zero points uint8 [rows, bytes].
    """

    group: int

    @property
    def is_float(self) -> bool:
        return False

    @property
    def levels(self) -> int:
        """The number of different codes."""
        return 1 << self.bits

    def groups(self, columns: int) -> int:
        """Return how many groups a row of `columns` elements has."""
        return -(-columns // self.group)

    def tensors(self, name: str, rows: int, columns: int) -> tuple[StoredTensor, ...]:
        groups = self.groups(columns)
        return (
            StoredTensor(name, (rows, packed_bytes(columns, self.bits)), "uint8"),
            StoredTensor(f"{name}.{SCALES}", (rows, groups), "float16"),
            StoredTensor(f"{name}.{ZERO_POINTS}", (rows, packed_bytes(groups, self.bits)), "uint8"),
        )

    def row_bytes(self, columns: int) -> int:
        groups = self.groups(columns)
        return packed_bytes(columns, self.bits) + 2 * groups + packed_bytes(groups, self.bits)


def packed_bytes(count: int, bits: int) -> int:
    """Return the number of bytes, rounded up, that `count` numbers of `bits` bits take."""
    return -(-count * bits // 8)


def integer_format(bits: int, group: int = DEFAULT_GROUP) -> IntegerFormat:
    """Return the format of integers of `bits` bits in groups."""
    return IntegerFormat(f"int{bits}_g{group}", bits, group)


FLOAT_FORMATS = {
    format.name: format
    for format in (WeightFormat("float32", 32), WeightFormat("float16", 16), WeightFormat("bfloat16", 16))
}
INTEGER_FORMATS = {format.name: format for format in (integer_format(bits, g) for bits in (4, 8) for g in GROUPS)}
FORMATS: dict[str, WeightFormat] = {**FLOAT_FORMATS, **INTEGER_FORMATS}
