"""Codes of integer formats: packing, rounding, and decoding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tda_export.weights import integers
from tda_export.weights.formats import INTEGER_FORMATS, IntegerFormat, integer_format
from tda_export.weights.integers import SHRINKS, SMALLEST_SCALE, Codes, pack_bits, round_to_nearest, unpack_bits

formats = st.sampled_from(list(INTEGER_FORMATS.values()))
sizes = st.tuples(st.integers(1, 5), st.integers(1, 200))


def random_weight(size: tuple[int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


@given(bits=st.sampled_from([4, 8]), size=sizes, seed=st.integers(0, 9))
def test_packed_numbers_come_back(bits: int, size: tuple[int, int], seed: int) -> None:
    numbers = np.random.default_rng(seed).integers(0, 1 << bits, size, dtype=np.uint8)
    packed = pack_bits(numbers, bits)
    assert packed.shape == (size[0], -(-size[1] * bits // 8))
    assert np.array_equal(unpack_bits(packed, size[1], bits), numbers)


def test_the_first_of_a_byte_lies_in_its_low_bits() -> None:
    assert pack_bits(np.array([[1, 2, 3]], np.uint8), 4).tolist() == [[0x21, 0x03]]


@given(format=formats, size=sizes, seed=st.integers(0, 9))
def test_tensors_have_the_shapes_and_bytes_of_the_format(
    format: IntegerFormat, size: tuple[int, int], seed: int
) -> None:
    codes = round_to_nearest(random_weight(size, seed), format)
    stored = format.tensors("w", *size)
    packed = codes.pack()
    assert [tensor.shape for tensor in stored] == [array.shape for array in packed]
    assert [tensor.dtype for tensor in stored] == [array.dtype.name for array in packed]
    assert sum(array.nbytes for array in packed) == size[0] * format.row_bytes(size[1])
    again = Codes.unpack(format, size[1], *packed)
    assert np.array_equal(again.decode(), codes.decode())


@given(format=formats, size=sizes, seed=st.integers(0, 9), symmetric=st.booleans())
def test_elements_are_off_by_half_a_step_at_most(
    format: IntegerFormat, size: tuple[int, int], seed: int, symmetric: bool
) -> None:
    weight = random_weight(size, seed)
    codes = round_to_nearest(weight, format, symmetric=symmetric, search=False)
    step = np.repeat(codes.scales.astype(np.float32), format.group, axis=1)[:, : size[1]]
    # Elements at the ends may be off by a step, since scale and zero point are rounded too.
    assert (np.abs(codes.decode() - weight) <= 1.01 * step).all()
    assert np.median(np.abs(codes.decode() - weight) / step) <= 0.5
    if symmetric:
        assert (codes.zero_points == format.levels // 2).all()


@given(format=formats, size=sizes, seed=st.integers(0, 9), symmetric=st.booleans())
@example(format=integer_format(4, 128), size=(50, 130), seed=0, symmetric=False)
def test_a_searched_range_is_no_worse(format: IntegerFormat, size: tuple[int, int], seed: int, symmetric: bool) -> None:
    """In any row and group, also in the last group, which may be short."""
    weight = random_weight(size, seed)
    starts = np.arange(0, size[1], format.group)
    plain, searched = (
        np.add.reduceat(np.square(found.decode() - weight), starts, axis=1)
        for found in (round_to_nearest(weight, format, symmetric=symmetric, search=search) for search in (False, True))
    )
    assert (searched <= 1.0001 * plain + 1e-12).all()


def parameters_by_hand(group: np.ndarray, format: IntegerFormat, symmetric: bool) -> list[tuple[float, float, float]]:
    """Return scale, zero point and squared error of a group at every range, by their definitions."""
    most, middle = format.levels - 1, format.levels // 2
    low, high = min(group.min(), np.float32(0)), max(group.max(), np.float32(0))
    found = []
    for shrink in SHRINKS:
        whole = max(-low / middle, high / (most - middle)) if symmetric else (high - low) / most
        scale = np.float32(np.float16(max(whole * shrink, SMALLEST_SCALE)))
        zero_point = middle if symmetric else min(max(np.rint(-low * shrink / scale), 0), most)
        codes = np.clip(np.rint(group / scale) + zero_point, 0, most).astype(np.float64)
        error = (((codes - zero_point) * scale - group.astype(np.float64)) ** 2).sum()
        found.append((float(scale), float(zero_point), float(error)))
    return found


@given(format=formats, size=sizes, seed=st.integers(0, 9), symmetric=st.booleans(), few=st.sampled_from([128, 1 << 16]))
def test_the_best_of_all_ranges(
    format: IntegerFormat, size: tuple[int, int], seed: int, symmetric: bool, few: int
) -> None:
    weight = random_weight(size, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integers, "ELEMENTS_AT_ONCE", few)
        codes = round_to_nearest(weight, format, symmetric=symmetric)
    for row, group in np.ndindex(codes.scales.shape):
        own = weight[row, group * format.group :][: format.group]
        candidates = parameters_by_hand(own, format, symmetric)
        scale, zero_point = float(codes.scales[row, group]), float(codes.zero_points[row, group])
        errors = {(scale, zero_point): error for scale, zero_point, error in candidates}
        assert errors[scale, zero_point] <= min(errors.values()) * (1 + 1e-5)  # the choice compares float32 sums
        expected = np.clip(np.rint(own / np.float32(scale)) + zero_point, 0, format.levels - 1)
        assert np.array_equal(codes.codes[row, group * format.group :][: format.group], expected)


@given(format=formats, values=st.lists(st.sampled_from([0.0, 1e-9, -3e4, 3e4, 1.0]), min_size=1, max_size=150))
def test_odd_groups_decode_to_finite_numbers(format: IntegerFormat, values: list[float]) -> None:
    weight = np.array([values], np.float32)
    decoded = round_to_nearest(weight, format).decode()
    assert np.isfinite(decoded).all()
    assert (decoded[weight == 0] == 0).all()


def test_matrices_side_by_side() -> None:
    format = integer_format(4)
    parts = [round_to_nearest(random_weight((3, columns), columns), format) for columns in (64, 32, 5)]
    joined = parts[0].beside(*parts[1:])
    assert np.array_equal(joined.decode(), np.concatenate([part.decode() for part in parts], axis=1))
    with pytest.raises(ValueError, match="not whole groups of 32"):
        parts[2].beside(parts[0])
