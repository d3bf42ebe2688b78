"""Codes of integer formats: rounding to them, packing them as weights.bin has them, and back to floats. numpy alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from tda_export.weights.formats import IntegerFormat, packed_bytes

SHRINKS = np.linspace(1.0, 0.7, 13, dtype=np.float32)  # of a group's range, among which the best is searched for
SMALLEST_SCALE = np.float32(2.0**-24)  # float16's own


@dataclass(frozen=True)
class Codes:
    """A matrix [rows, columns] of an integer format, unpacked.

    `codes` uint8 [rows, columns], `scales` float16 [rows, groups], `zero_points` uint8 [rows, groups].
    """

    format: IntegerFormat
    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray

    def decode(self) -> np.ndarray:
        """Return the elements, float32 [rows, columns]."""
        columns, group = self.codes.shape[1], self.format.group
        scales = np.repeat(self.scales.astype(np.float32), group, axis=1)[:, :columns]
        zero_points = np.repeat(self.zero_points.astype(np.int16), group, axis=1)[:, :columns]
        return (self.codes.astype(np.int16) - zero_points).astype(np.float32) * scales

    def pack(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the stored tensors, in the order of `IntegerFormat.tensors`."""
        bits = self.format.bits
        return pack_bits(self.codes, bits), np.ascontiguousarray(self.scales), pack_bits(self.zero_points, bits)

    @staticmethod
    def unpack(
        format: IntegerFormat, columns: int, codes: np.ndarray, scales: np.ndarray, zero_points: np.ndarray
    ) -> Codes:
        """Undo `pack`."""
        groups = format.groups(columns)
        return Codes(
            format, unpack_bits(codes, columns, format.bits), scales, unpack_bits(zero_points, groups, format.bits)
        )

    def beside(self, *others: Codes) -> Codes:
        """Put matrices of the same rows side by side; the columns of all but the last must be whole groups.

        Raises:
            ValueError: They are not.
        """
        every = (self, *others)
        if any(codes.codes.shape[1] % self.format.group for codes in every[:-1]):
            raise ValueError(f"columns are no whole groups of {self.format.group}")
        joined = (np.concatenate([getattr(c, field) for c in every], axis=1) for field in FIELDS)
        return Codes(self.format, *joined)


FIELDS = ("codes", "scales", "zero_points")


class CodesByName(Mapping[str, Codes]):
    """Matrices by name, each read when it is looked at, every time."""

    def __init__(self, read: Mapping[str, Callable[[], Codes]]) -> None:
        self._read = dict(read)

    def __getitem__(self, name: str) -> Codes:
        return self._read[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._read

    def __iter__(self) -> Iterator[str]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)


def pack_bits(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Pack uint8 [rows, n] below 2**bits, the first of a byte in its low bits: uint8 [rows, bytes]."""
    if bits == 8:
        return np.ascontiguousarray(numbers)
    rows, count = numbers.shape
    padded = np.zeros((rows, 2 * packed_bytes(count, bits)), np.uint8)
    padded[:, :count] = numbers
    return padded[:, 0::2] | (padded[:, 1::2] << 4)


def unpack_bits(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    """Undo `pack_bits`."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=2).reshape(packed.shape[0], -1)[:, :count]


@np.errstate(over="ignore", invalid="ignore")
def round_to_nearest(
    weight: np.ndarray, format: IntegerFormat, *, symmetric: bool = False, search: bool = True
) -> Codes:
    """Round each element to the nearest code, groups by themselves.

    Args:
        weight: float32 [rows, columns], finite.
        format: Of the codes.
        symmetric: Let zero points be the middle code.
        search: Try ranges smaller than the group's own, and take the one of the least squared error.

    Returns:
        The codes. Scales are rounded to float16 before elements are rounded to codes; where that is too small for a
        group its scale is infinite.
    """
    rows, columns = weight.shape
    groups = format.groups(columns)
    padded = np.zeros((rows, groups * format.group), np.float32)
    padded[:, :columns] = weight
    padded[:, columns:] = weight[:, -1:]  # what stands past the end changes no group's range
    grouped = padded.reshape(rows, groups, format.group)
    best = None
    for shrink in SHRINKS if search else SHRINKS[:1]:
        scales, zero_points = group_parameters(grouped, format, shrink, symmetric=symmetric)
        codes = nearest_codes(grouped, scales, zero_points, format)
        squares = np.square((codes - zero_points[..., None]) * scales[..., None] - grouped)
        squares.reshape(rows, -1)[:, columns:] = 0  # nor does it count
        error = squares.sum(axis=2)
        if best is None:
            best = [error, scales, zero_points, codes]
            continue
        better = error < best[0]
        for kept, new in zip(best, (error, scales, zero_points, codes), strict=True):
            kept[better] = new[better]
    assert best is not None
    _, scales, zero_points, codes = best
    return Codes(
        format,
        codes.reshape(rows, -1)[:, :columns].astype(np.uint8),
        scales.astype(np.float16),
        zero_points.astype(np.uint8),
    )


def group_parameters(
    grouped: np.ndarray, format: IntegerFormat, shrink: float = 1.0, *, symmetric: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scale (a float16's value) and zero point of each group, float32 [..]; grouped is float32 [.., group].

    The range is that of the elements and zero, times `shrink`.
    """
    most = format.levels - 1
    low, high = np.minimum(grouped.min(axis=-1), 0), np.maximum(grouped.max(axis=-1), 0)
    if symmetric:
        middle = format.levels // 2
        scales = np.maximum(-low / middle, high / (most - middle)) * shrink
    else:
        scales = (high - low) / most * shrink
    scales = np.maximum(scales, SMALLEST_SCALE).astype(np.float16).astype(np.float32)
    if symmetric:
        return scales, np.full_like(scales, format.levels // 2)
    return scales, np.clip(np.rint(-low * shrink / scales), 0, most)


def nearest_codes(
    grouped: np.ndarray, scales: np.ndarray, zero_points: np.ndarray, format: IntegerFormat
) -> np.ndarray:
    """Return the code nearest to each element [.., group], as float32."""
    return np.clip(np.rint(grouped / scales[..., None]) + zero_points[..., None], 0, format.levels - 1)
