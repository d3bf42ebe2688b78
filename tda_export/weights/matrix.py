"""The one description of a weight matrix: sizes, bytes and layout, wherever they are needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tda_export.weights.formats import FORMATS, StoredTensor, WeightFormat

# What a row of a stored matrix belongs to. `input`: row i holds what leaves input channel i, so that y is the sum of
# x_i times row i, and a row whose x_i does not matter need not be read. `output`: row j is multiplied by x and gives
# y_j.
Major = Literal["input", "output"]


@dataclass(frozen=True)
class Matrix:
    """A matrix of weights.bin, [rows, columns], one row after another. `name` is that of its first tensor."""

    name: str
    rows: int
    columns: int
    format: WeightFormat
    major: Major

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def inputs(self) -> int:
        """Elements of x in y = W x."""
        return self.rows if self.major == "input" else self.columns

    @property
    def outputs(self) -> int:
        """Elements of y in y = W x."""
        return self.columns if self.major == "input" else self.rows

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.format.row_bytes(self.columns)

    @property
    def bytes(self) -> int:
        """Bytes of all rows."""
        return self.rows * self.row_bytes

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The tensors of weights.bin that it is stored in."""
        return self.format.tensors(self.name, self.rows, self.columns)

    def describe(self) -> dict[str, Any]:
        """Return what a manifest keeps under the matrix's name."""
        return {
            "format": self.format.name,
            "rows": self.rows,
            "columns": self.columns,
            "major": self.major,
            "tensors": [tensor.name for tensor in self.tensors],
        }


def read_matrix(name: str, content: dict[str, Any]) -> Matrix:
    """Read back what `Matrix.describe` gave.

    Raises:
        ValueError: It is no description of a matrix of this version.
    """
    rows, columns = content["rows"], content["columns"]
    if not all(type(size) is int and size > 0 for size in (rows, columns)):
        raise ValueError(f"matrices.{name}: rows and columns")
    if content["format"] not in FORMATS:
        raise ValueError(f"matrices.{name}.format")
    if content["major"] not in ("input", "output"):
        raise ValueError(f"matrices.{name}.major")
    matrix = Matrix(name, rows, columns, FORMATS[content["format"]], content["major"])
    if content["tensors"] != matrix.describe()["tensors"]:
        raise ValueError(f"matrices.{name}.tensors")
    return matrix
