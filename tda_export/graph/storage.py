"""How an artifact stores its matrices: as floats, or as codes of an integer format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch

from tda_export.errors import TdaError, UsageError
from tda_export.graph import contract
from tda_export.models.layout import LazyTensor
from tda_export.models.source import ModelSource
from tda_export.models.spec import DecoderSpec
from tda_export.packing import RowBytes, linear_parts, row_bytes_of
from tda_export.quantization.nearest import round_matrix
from tda_export.weights.formats import DEFAULT_GROUP, FORMATS, IntegerFormat
from tda_export.weights.integers import Codes
from tda_export.weights.matrix import Major, Matrix
from tda_export.weights.plan import FLOAT, FormatPlan, plan_formats, read_rules


@dataclass(frozen=True)
class PlannedWeight:
    """A tensor of weights.bin: its name in the graphs, shape, dtype, and how to make it.

    `matrix`: the matrix whose first tensor this is, None for other tensors.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], torch.Tensor]
    matrix: Matrix | None = None

    @property
    def bytes(self) -> int:
        """The bytes of the tensor in the file, without padding."""
        return contract.tensor_bytes(self.shape, self.dtype)


@dataclass(frozen=True)
class Storage:
    """How tensors are stored.

    `dtype`: a value of `contract.DTYPES`, for activations and all floats. `formats`: the format of every matrix; None
    means all floats. `codes`: the checkpoint's own codes, [in, out] in layers, the embedding's [out, in], and the
    head's as the formats say, which are stored unchanged; other matrices are rounded, and again where they are to lie
    the other way.
    """

    dtype: str
    formats: FormatPlan | None = None
    codes: Mapping[str, Codes] = field(default_factory=dict)
    quantizer: ClassVar[str] = "rtn"  # how matrices without codes in the checkpoint become integers

    @property
    def has_integers(self) -> bool:
        """Whether some matrix is stored as integers."""
        return self.formats is not None and bool(self.formats.integers)

    @property
    def rounds(self) -> bool:
        """Whether some matrix is rounded to integers that the checkpoint does not have, which changes the model."""
        return self.formats is not None and any(name not in self.codes for name in self.formats.integers)

    def row_bytes(self, spec: DecoderSpec, *, head: bool = False) -> RowBytes:
        """Return the bytes of the rows of the layers' linears, and with `head` of the head's by input channel."""
        return row_bytes_of(spec, contract.DTYPE_BYTES[self.dtype], self.formats, head=head)

    def plan(self, target: str, tensor: LazyTensor, major: Major, members: Sequence[str]) -> Iterator[PlannedWeight]:
        """List the tensors of a matrix.

        Args:
            target: The matrix's name in the graphs.
            tensor: [rows, columns].
            major: What a row belongs to: an input or an output.
            members: The names of the matrices that lie side by side in it.

        Raises:
            UsageError: Matrices side by side have different formats.
        """
        rows, columns = tensor.shape
        formats = {None if self.formats is None else self.formats.of(name) for name in members}
        if len(formats) > 1:
            raise UsageError(
                f"{', '.join(members)} have different formats, and lie side by side. Give them one format, or build "
                "with --packing separate."
            )
        found = formats.pop()
        if not isinstance(found, IntegerFormat):
            matrix = Matrix(target, rows, columns, FORMATS[self.dtype], major)
            yield PlannedWeight(target, tensor.shape, self.dtype, tensor.load, matrix)
            return
        matrix = Matrix(target, rows, columns, found, major)
        coming = _TensorsToCome(partial(self.packed, matrix, tensor, members))
        for index, stored in enumerate(matrix.tensors):
            load = partial(coming.tensor, index)
            yield PlannedWeight(stored.name, stored.shape, stored.dtype, load, None if index else matrix)

    def packed(self, matrix: Matrix, tensor: LazyTensor, members: Sequence[str]) -> list[torch.Tensor]:
        """Make the tensors of an integer matrix, in the order of `Matrix.tensors`.

        Args:
            matrix: The matrix to store.
            tensor: Its elements [rows, columns].
            members: The names of the matrices that lie side by side in it.

        Raises:
            UsageError: The checkpoint's codes cannot lie side by side.
            TdaError: The codes have another shape, or elements cannot be rounded.
        """
        assert isinstance(matrix.format, IntegerFormat)
        return [torch.from_numpy(array) for array in self._codes(tensor, members, matrix.format, matrix.major).pack()]

    def _codes(self, tensor: LazyTensor, members: Sequence[str], format: IntegerFormat, major: Major) -> Codes:
        given = [self.codes[name] for name in members if name in self.codes and major == self._major_of_codes(name)]
        if len(given) < len(members):
            rows = tensor.load().float().contiguous()
            return round_matrix(", ".join(members), rows, format, symmetric=False)
        try:
            codes = given[0].beside(*given[1:])
        except ValueError as error:
            raise UsageError(
                f"{', '.join(members)} cannot lie side by side: their {error}. Build with --packing separate."
            ) from error
        if codes.codes.shape != tensor.shape:
            raise TdaError(
                f"{', '.join(members)}: codes of shape {list(codes.codes.shape)}, and the configuration says "
                f"{list(tensor.shape)}. Quantise the model again."
            )
        return codes

    def _major_of_codes(self, name: str) -> Major:
        """Return how the checkpoint's codes of a matrix lie."""
        if name == contract.EMBEDDING:
            return "output"
        return self.formats.head_major if name == contract.HEAD and self.formats is not None else "input"


def storage_of(source: ModelSource, dtype: str, plan: FormatPlan | None = None) -> Storage:
    """Return how a model is stored: as it is quantised, or by a plan of formats; None means all floats."""
    return Storage(dtype, source.formats or plan, source.codes)


def read_plan(source: ModelSource, weights: str, group: int | None, rules: Sequence[str]) -> FormatPlan | None:
    """Read the requested formats of a float model's matrices; None where all stay floats.

    Args:
        source: The model.
        weights: `float`, `int8` or `int4`.
        group: The number of integers that share a scale; None is the default.
        rules: Exceptions (`weights.plan.read_rules`).

    Raises:
        UsageError: A rule is malformed or matches nothing, the model is quantised already, or a group is given for
            floats.
    """
    if source.formats is not None:
        if weights == FLOAT and group is None and not rules:
            return None
        raise UsageError(
            f"{source.name} is quantised already, and keeps its formats. Leave --weights, --group and --weights-for "
            "out, or give the float model."
        )
    spec, chosen = source.spec, DEFAULT_GROUP if group is None else group
    plan = plan_formats(
        spec.num_layers,
        linear_parts(spec),
        tied_head=spec.tied_head,
        weights=weights,
        group=chosen,
        rules=read_rules(rules, chosen),
    )
    if plan.integers:
        return plan
    if group is not None:
        raise UsageError("--group has no effect where all weights are floats. Leave it out, or give --weights int4.")
    return None


class _TensorsToCome:
    """The tensors of a matrix of codes: made when the first is read, and freed with the last."""

    def __init__(self, make: Callable[[], list[torch.Tensor]]) -> None:
        self._make = make
        self._made: list[torch.Tensor] = []

    def tensor(self, index: int) -> torch.Tensor:
        if not self._made:
            self._made = self._make()
        tensor = self._made[index]
        if index == len(self._made) - 1:
            self._made = []
        return tensor
