"""The one description of a weight matrix: its sizes, bytes and layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tda_export.weights.formats import FORMATS, StoredTensor, WeightFormat

# What a row of a stored matrix belongs to. `input`: row i holds the weights of input channel i, so y is the sum of x_i
# times row i, and a row need not be read where its x_i does not matter. `output`: row j times x gives y_j.
Major = Literal["input", "output"]


@dataclass(frozen=True)
class Matrix:
    """A matrix of weights.bin, [rows, columns], one row after another. `name` is the name of its first tensor."""

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
        """The number of elements of x in y = W x."""
        return self.rows if self.major == "input" else self.columns

    @property
    def outputs(self) -> int:
        """The number of elements of y in y = W x."""
        return self.columns if self.major == "input" else self.rows

    @property
    def row_bytes(self) -> int:
        """The bytes of one row."""
        return self.format.row_bytes(self.columns)

    @property
    def bytes(self) -> int:
        """The bytes of all rows."""
        return self.rows * self.row_bytes

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The tensors of weights.bin that hold the matrix."""
        return self.format.tensors(self.name, self.rows, self.columns)

    def describe(self) -> dict[str, Any]:
        """Return the manifest's entry under the matrix's name."""
        return {
            "format": self.format.name,
            "rows": self.rows,
            "columns": self.columns,
            "major": self.major,
            "tensors": [tensor.name for tensor in self.tensors],
        }


def read_matrix(name: str, content: dict[str, Any]) -> Matrix:
    """Read a matrix back from the result of `Matrix.describe`.

    Raises:
        ValueError: The content is not a description of a matrix in this version.
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
