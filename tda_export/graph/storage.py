"""How the matrices of an artifact are stored: as floats, or as codes of an integer format."""

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

    `matrix`: of which it is the first tensor, None of others.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], torch.Tensor]
    matrix: Matrix | None = None

    @property
    def bytes(self) -> int:
        """What it takes in the file, without padding."""
        return contract.tensor_bytes(self.shape, self.dtype)


@dataclass(frozen=True)
class Storage:
    """How tensors are stored.

    `dtype`: a value of `contract.DTYPES`, of activations and of all that is no integer. `formats`: of every matrix;
    None is all floats. `codes`: those that the checkpoint has, [in, out] in layers, [out, in] outside, which are stored
    as they are; others are rounded.
    """

    dtype: str
    formats: FormatPlan | None = None
    codes: Mapping[str, Codes] = field(default_factory=dict)
    quantizer: ClassVar[str] = "rtn"  # how integers come about that the checkpoint does not have

    @property
    def has_integers(self) -> bool:
        """Whether some matrix is stored as integers."""
        return self.formats is not None and bool(self.formats.integers)

    @property
    def rounds(self) -> bool:
        """Whether some matrix becomes integers that the checkpoint does not have: another model than its own."""
        return self.formats is not None and any(name not in self.codes for name in self.formats.integers)

    def row_bytes(self, spec: DecoderSpec) -> RowBytes:
        """Return what rows of the layers' linears take."""
        return row_bytes_of(spec, contract.DTYPE_BYTES[self.dtype], self.formats)

    def plan(self, target: str, tensor: LazyTensor, major: Major, members: Sequence[str]) -> Iterator[PlannedWeight]:
        """List the tensors of a matrix.

        Args:
            target: Its name in the graphs.
            tensor: [rows, columns].
            major: What a row is.
            members: The names of what lies side by side in it.

        Raises:
            UsageError: What lies side by side has different formats.
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
        """Make the tensors of a matrix of integers, in the order of `Matrix.tensors`.

        Args:
            matrix: What is stored.
            tensor: Its elements [rows, columns].
            members: The names of what lies side by side in it.

        Raises:
            UsageError: The checkpoint's codes cannot lie side by side.
            TdaError: They have another shape, or elements cannot be rounded.
        """
        assert isinstance(matrix.format, IntegerFormat)
        return [torch.from_numpy(array) for array in self._codes(tensor, members, matrix.format).pack()]

    def _codes(self, tensor: LazyTensor, members: Sequence[str], format: IntegerFormat) -> Codes:
        given = [self.codes[name] for name in members if name in self.codes]
        if len(given) < len(members):
            rows = tensor.load().float().contiguous().numpy()
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


def storage_of(source: ModelSource, dtype: str, plan: FormatPlan | None = None) -> Storage:
    """Return how a model is stored: as it is quantised, or by a plan of formats; None is all floats."""
    return Storage(dtype, source.formats or plan, source.codes)


def read_plan(source: ModelSource, weights: str, group: int | None, rules: Sequence[str]) -> FormatPlan | None:
    """Read the formats that a float model is asked to be stored in, None where all stay floats.

    Args:
        source: The model.
        weights: `float`, `int8` or `int4`.
        group: Integers that share a scale; None is the default.
        rules: Exceptions (`weights.plan.read_rules`).

    Raises:
        UsageError: A rule is none or matches nothing, the model is quantised already, or a group is given for floats.
    """
    if source.formats is not None:
        if weights == FLOAT and group is None and not rules:
            return None
        raise UsageError(
            f"{source.name} is quantised already, and is stored as it is. Leave --weights, --group and --weights-for "
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
    """The tensors of a matrix of codes, which are made when its first is read, and let go with its last."""

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
