"""Codes of integer formats: round to them, pack them as in weights.bin, and convert them back to floats. NumPy only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from tda_export.weights.formats import IntegerFormat, packed_bytes

SHRINKS = np.linspace(1.0, 0.7, 13, dtype=np.float32)  # factors of a group's range that the search tries
SMALLEST_SCALE = np.float32(2.0**-24)  # the smallest float16
ELEMENTS_AT_ONCE = 1 << 16  # elements of one search block, whose two arrays stay in the cache


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
            raise ValueError(f"columns are not whole groups of {self.format.group}")
        joined = (np.concatenate([getattr(c, field) for c in every], axis=1) for field in FIELDS)
        return Codes(self.format, *joined)


@dataclass(frozen=True)
class PackedCodes:
    """A matrix of an integer format as it is stored: `tensors` in the order of `IntegerFormat.tensors`."""

    format: IntegerFormat
    rows: int
    columns: int
    tensors: tuple[np.ndarray, ...]

    @staticmethod
    def of(codes: Codes) -> PackedCodes:
        rows, columns = codes.codes.shape
        return PackedCodes(codes.format, rows, columns, codes.pack())

    def unpack(self) -> Codes:
        return Codes.unpack(self.format, self.columns, *self.tensors)


FIELDS = ("codes", "scales", "zero_points")


class CodesByName(Mapping[str, Codes]):
    """Matrices by name. Each is read anew on every access."""

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
    """Pack numbers below 2**bits, uint8 [rows, n], the first of a byte in its low bits: uint8 [rows, bytes]."""
    numbers = np.ascontiguousarray(numbers)
    if bits == 8:
        return numbers
    count = numbers.shape[1]
    if missing := 2 * packed_bytes(count, bits) - count:
        numbers = np.pad(numbers, ((0, 0), (0, missing)))
    pairs = numbers.view("<u2")  # the first number in the low byte
    return (pairs | (pairs >> 4)).astype(np.uint8)


def unpack_bits(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    """Undo `pack_bits`."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=2).reshape(packed.shape[0], -1)[:, :count]


@np.errstate(over="ignore", invalid="ignore")
def round_to_nearest(
    weight: np.ndarray, format: IntegerFormat, *, symmetric: bool = False, search: bool = True
) -> Codes:
    """Round each element to the nearest code, each group by itself.

    Args:
        weight: float32 [rows, columns], finite.
        format: The format of the codes.
        symmetric: Let zero points be the middle code.
        search: Try ranges smaller than the group's own, and take the one with the least squared error.

    Returns:
        The codes. Scales are rounded to float16 before elements are rounded to codes. The scale of a group is infinite
        where it overflows float16.
    """
    rows, columns = weight.shape
    groups = format.groups(columns)
    if missing := groups * format.group - columns:  # the padding of a row's last group changes no range
        weight = np.pad(weight, ((0, 0), (0, missing)), mode="edge")
    grouped = weight.reshape(-1, format.group)
    codes = np.empty(grouped.shape, np.uint8)
    scales, zero_points = np.empty(len(grouped), np.float16), np.empty(len(grouped), np.uint8)
    step = ELEMENTS_AT_ONCE // format.group
    for start in range(0, len(grouped), step):
        some = slice(start, start + step)
        block = np.ascontiguousarray(grouped[some].T)
        filling = slice(format.group - missing, None), slice((-1 - start) % groups, None, groups)
        found = _best_parameters(block, filling, format, SHRINKS if search else SHRINKS[:1], symmetric=symmetric)
        scales[some], zero_points[some] = found
        codes[some] = nearest_codes(block, *found, format).T
    return Codes(
        format,
        codes.reshape(rows, -1)[:, :columns],
        scales.reshape(rows, groups),
        zero_points.reshape(rows, groups),
    )


def _best_parameters(
    block: np.ndarray, filling: tuple[slice, slice], format: IntegerFormat, shrinks: np.ndarray, *, symmetric: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return each group's scale and zero point with the least squared error, the first of equals, float32 [n].

    Elements in the block's `filling` do not count.

    Rounding spends its time in the passes over `block`, float32 [group, n]. The block stays in the cache, and a group
    is a column, so that every pass runs along contiguous memory.
    """
    most = format.levels - 1
    low, high = np.minimum(block.min(axis=0), 0), np.maximum(block.max(axis=0), 0)
    left = np.empty_like(block)
    best: tuple[np.ndarray, ...] | None = None
    for shrink in shrinks:
        scales, zero_points = group_parameters(low, high, format, shrink, symmetric=symmetric)
        np.divide(block, scales, out=left)
        np.rint(left, out=left)
        np.maximum(left, -zero_points, out=left)
        np.minimum(left, most - zero_points, out=left)
        np.multiply(left, scales, out=left)
        np.subtract(left, block, out=left)
        left[filling] = 0
        error = np.einsum("ij,ij->j", left, left)
        if best is None:
            best = (error, scales, zero_points)
            continue
        better = error < best[0]
        for kept, new in zip(best, (error, scales, zero_points), strict=True):
            np.copyto(kept, new, where=better)
    assert best is not None
    return best[1], best[2]


def group_parameters(
    low: np.ndarray, high: np.ndarray, format: IntegerFormat, shrink: float = 1.0, *, symmetric: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scale (a float16's value) and zero point of each group, float32 [n].

    Args:
        low: The smallest of a group's elements and zero, float32 [n].
        high: The largest.
        format: The format of the codes.
        shrink: The factor of the range.
        symmetric: Let zero points be the middle code.
    """
    most = format.levels - 1
    if symmetric:
        middle = format.levels // 2
        scales = np.maximum(-low / middle, high / (most - middle)) * shrink
    else:
        scales = (high - low) / most * shrink
    scales = np.maximum(scales, SMALLEST_SCALE).astype(np.float16).astype(np.float32)
    if symmetric:
        return scales, np.full_like(scales, format.levels // 2)
    return scales, np.clip(np.rint(-low * shrink / scales), 0, most)


def nearest_codes(block: np.ndarray, scales: np.ndarray, zero_points: np.ndarray, format: IntegerFormat) -> np.ndarray:
    """Return the code nearest to each element [group, n], as float32."""
    return np.clip(np.rint(block / scales) + zero_points, 0, format.levels - 1)
