"""How the matrices of an artifact are stored: as floats, or as codes of an integer format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from tda_export.errors import TdaError, UsageError
from tda_export.graph import contract
from tda_export.models.layout import Tensor
from tda_export.models.spec import DecoderSpec
from tda_export.packing import RowBytes, format_name, linear_parts
from tda_export.weights.formats import FORMATS, IntegerFormat
from tda_export.weights.integers import Codes, round_to_nearest
from tda_export.weights.matrix import Major, Matrix

FormatOf = Callable[[str], IntegerFormat | None]


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

    `dtype`: a value of `contract.DTYPES`, of activations and of all that is no integer. `format_of`: the format of a
    matrix by its name: `layers.0.q` (`packing.format_name`), `embedding`, which a tied head is too, or `head`; None is
    a float. `codes`: those that the checkpoint has, [in, out] in layers, [out, in] outside, which are stored as they
    are; others are rounded.
    """

    dtype: str
    format_of: FormatOf = lambda name: None
    codes: Mapping[str, Codes] = field(default_factory=dict)

    def row_bytes(self, spec: DecoderSpec) -> RowBytes:
        """Return what rows of the layers' linears take."""
        names = [format_name(layer, part) for layer in range(spec.num_layers) for part in linear_parts(spec)]
        formats = {name: found for name in names if (found := self.format_of(name)) is not None}
        return RowBytes(contract.DTYPE_BYTES[self.dtype], formats)

    def plan(self, target: str, tensor: Tensor, major: Major, members: Sequence[str]) -> Iterator[PlannedWeight]:
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
        formats = {self.format_of(name) for name in members}
        if len(formats) > 1:
            raise UsageError(
                f"{', '.join(members)} have different formats, and lie side by side. Give them one format, or build "
                "with --packing separate."
            )
        found = formats.pop()
        if found is None:
            matrix = Matrix(target, rows, columns, FORMATS[self.dtype], major)
            yield PlannedWeight(target, tensor.shape, self.dtype, tensor.load, matrix)
            return
        matrix = Matrix(target, rows, columns, found, major)
        coming = _CodesToCome(partial(self._codes, tensor, members, found))
        for index, stored in enumerate(matrix.tensors):
            load = partial(coming.tensor, index)
            yield PlannedWeight(stored.name, stored.shape, stored.dtype, load, None if index else matrix)

    def _codes(self, tensor: Tensor, members: Sequence[str], format: IntegerFormat) -> Codes:
        given = [self.codes[name] for name in members if name in self.codes]
        if len(given) < len(members):
            return round_to_nearest(tensor.load().float().contiguous().numpy(), format)
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


class _CodesToCome:
    """The tensors of a matrix of codes, which are made when its first is read, and let go with its last."""

    def __init__(self, make: Callable[[], Codes]) -> None:
        self._make = make
        self._made: list[torch.Tensor] = []

    def tensor(self, index: int) -> torch.Tensor:
        if not self._made:
            self._made = [torch.from_numpy(array) for array in self._make().pack()]
        tensor = self._made[index]
        if index == len(self._made) - 1:
            self._made = []
        return tensor
