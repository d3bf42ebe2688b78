"""How the elements of a matrix are stored. A float is a format like any other."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightFormat:
    """A way of storing numbers. `name` is what a manifest calls it, `bits` what one element takes."""

    name: str
    bits: int

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of a row of so many elements."""
        return -(-columns * self.bits // 8)


FORMATS = {
    format.name: format
    for format in (WeightFormat("float32", 32), WeightFormat("float16", 16), WeightFormat("bfloat16", 16))
}
