"""Integer matrices drawn directly as codes, without floats: a large model takes no longer than writing its file."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from tda_export.graph.storage import Storage
from tda_export.models.layout import LazyTensor
from tda_export.weights.formats import IntegerFormat
from tda_export.weights.matrix import Matrix
from tda_export.weights.plan import FormatPlan

SPREAD = 0.25  # scales are uniform within this share of their middle


@dataclass(frozen=True)
class RandomStorage(Storage):
    """How a random model is stored: its integer matrices are drawn, all else comes from its weights."""

    seed: int = 0
    quantizer: ClassVar[str] = "random"

    def packed(self, matrix: Matrix, tensor: LazyTensor, members: Sequence[str]) -> list[torch.Tensor]:
        return [torch.from_numpy(array) for array in draw_packed(matrix, self.seed)]


def random_storage(dtype: str, plan: FormatPlan | None, seed: int = 0) -> Storage:
    """Return the storage of a random model for a plan of formats; None means all floats."""
    return Storage(dtype) if plan is None else RandomStorage(dtype, plan, seed=seed)


def draw_packed(matrix: Matrix, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw the tensors of an integer matrix as stored in weights.bin, the same on every machine.

    Codes are uniform, and zero points are one of the two middle codes, so that elements have a mean of 0. Their
    standard deviation is 1 / sqrt(inputs), as in float random models, so that activations keep their size.

    Args:
        matrix: A matrix of an integer format.
        seed: The seed; each matrix has its own numbers, by its name.

    Returns:
        Codes uint8 [rows, bytes], scales float16 [rows, groups] and zero points uint8 [rows, bytes].
    """
    format = matrix.format
    assert isinstance(format, IntegerFormat)
    numbers = np.random.SFC64([seed, zlib.crc32(matrix.name.encode())])
    codes, scales, zero_points = matrix.tensors
    low = format.levels // 2 - 1
    middle = low if format.bits == 8 else low * 0x11  # in every half of a byte
    upper = 0x01 if format.bits == 8 else 0x11
    spread = np.linspace(1 - SPREAD, 1 + SPREAD, 256)
    scale = matrix.inputs**-0.5 / code_deviation(format) / np.sqrt(np.square(spread).mean())
    return (
        _random_bytes(numbers, codes.shape),
        (scale * spread).astype(np.float16)[_random_bytes(numbers, scales.shape)],
        middle + (_random_bytes(numbers, zero_points.shape) & np.uint8(upper)),
    )


def code_deviation(format: IntegerFormat) -> float:
    """Return the standard deviation of uniform codes minus a zero point that is either of the two middle codes."""
    return float(np.sqrt((format.levels**2 - 1) / 12 + 0.25))


def _random_bytes(numbers: np.random.SFC64, shape: tuple[int, ...]) -> np.ndarray:
    """Draw uint8 of a shape, eight at a time: as fast as memory is filled."""
    count = int(np.prod(shape))
    drawn = numbers.random_raw(-(-count // 8)).astype("<u8", copy=False)
    return drawn.view(np.uint8)[:count].reshape(shape)
