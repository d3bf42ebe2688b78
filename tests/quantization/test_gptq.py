"""GPTQ against rounding to nearest and against an obvious reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tda_export.errors import TdaError
from tda_export.quantization import gptq
from tda_export.quantization.gptq import (
    LazyMatrix,
    passed_on,
    quantise_rows,
    quantise_together,
    row_order,
    search_groups,
)
from tda_export.ranks import Ranks
from tda_export.weights.formats import INTEGER_FORMATS, IntegerFormat, integer_format
from tda_export.weights.integers import SHRINKS, Codes, round_to_nearest

formats = st.sampled_from(list(INTEGER_FORMATS.values()))


def random_weight(inputs: int, outputs: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((inputs, outputs)).astype(np.float32)


def random_hessian(inputs: int, seed: int, tokens: int = 300) -> torch.Tensor:
    """Return the Hessian of correlated inputs of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) * torch.rand(inputs, generator=generator).mul(3).exp()
    x = torch.randn(tokens, inputs, generator=generator) @ mix / inputs**0.5
    return x.T @ x


def error(weight: np.ndarray, codes: Codes, hessian: torch.Tensor) -> float:
    """Return tr(E^T H E)."""
    e = torch.from_numpy(codes.decode() - weight).double()
    return float((e * (hessian.double() @ e)).sum())


def same(one: Codes, other: Codes) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("codes", "scales", "zero_points"))


@settings(max_examples=40)
@given(
    format=formats,
    size=st.tuples(st.integers(1, 20), st.integers(1, 150)),
    seed=st.integers(0, 9),
    symmetric=st.booleans(),
)
def test_inputs_that_are_independent_give_rounding_to_nearest(
    format: IntegerFormat, size: tuple[int, int], seed: int, symmetric: bool
) -> None:
    weight = random_weight(*size, seed)
    codes = quantise_rows(torch.from_numpy(weight), row_order(torch.eye(size[0])), format, symmetric=symmetric)
    assert same(codes, round_to_nearest(weight, format, symmetric=symmetric))


@settings(max_examples=25)
@given(
    format=formats,
    size=st.tuples(st.integers(8, 70), st.integers(20, 150)),
    seed=st.integers(0, 9),
    symmetric=st.booleans(),
)
def test_its_error_on_the_inputs_is_no_worse_than_rounding(
    format: IntegerFormat, size: tuple[int, int], seed: int, symmetric: bool
) -> None:
    weight, hessian = random_weight(*size, seed), random_hessian(size[0], seed)
    codes = quantise_rows(torch.from_numpy(weight), row_order(hessian), format, symmetric=symmetric)
    assert error(weight, codes, hessian) <= error(
        weight, round_to_nearest(weight, format, symmetric=symmetric), hessian
    )


def by_hand(weight: np.ndarray, hessian: torch.Tensor, format: IntegerFormat) -> Codes:
    """Round row after row. After each, change the rows that follow so that the error is smallest: a least-squares
    problem for each row, without any factor."""
    h = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(len(hessian), dtype=torch.float64)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    left = torch.from_numpy(weight).double()
    found: dict[int, Codes] = {}
    for place, row in enumerate(order.tolist()):
        own = round_to_nearest(left[row].float().numpy()[None], format)
        found[row] = own
        change = torch.from_numpy(own.decode()[0]).double() - left[row]
        later = order[place + 1 :]
        # min over D of tr([change; D]^T H [change; D]) over this row and those after it
        if len(later):
            left[later] -= torch.linalg.solve(h[later][:, later], h[later][:, [row]]) @ change[None]
    rows = [found[row] for row in range(len(weight))]
    fields = ("codes", "scales", "zero_points")
    return Codes(format, *(np.concatenate([getattr(row, name) for row in rows]) for name in fields))


@pytest.mark.parametrize(("inputs", "outputs"), [(24, 64), (33, 45)])
def test_against_least_squares(inputs: int, outputs: int) -> None:
    weight, hessian, format = random_weight(inputs, outputs, 1), random_hessian(inputs, 1), integer_format(4)
    codes = quantise_rows(torch.from_numpy(weight), row_order(hessian), format)
    expected = by_hand(weight, hessian, format)
    assert (codes.codes != expected.codes).mean() < 0.01  # elements near the middle of two codes may differ
    assert error(weight, codes, hessian) == pytest.approx(error(weight, expected, hessian), rel=0.02)


@settings(max_examples=25)
@given(format=formats, size=st.tuples(st.integers(1, 40), st.integers(1, 80)), seed=st.integers(0, 9))
def test_its_errors_are_those_of_rounding_passed_on(format: IntegerFormat, size: tuple[int, int], seed: int) -> None:
    """The errors of a quantised matrix, converted back to those of rounding alone, are at most half a step unless a
    code is cut off."""
    weight, hessian = random_weight(*size, seed), random_hessian(size[0], seed)
    rows = row_order(hessian)
    codes = quantise_rows(torch.from_numpy(weight), rows, format)
    errors = torch.from_numpy(codes.decode() - weight).double()
    factor = rows.factor.double()
    own = (torch.linalg.solve(factor.T, errors[rows.order]) * factor.diagonal()[:, None])[rows.order.argsort()]
    steps = torch.from_numpy(np.repeat(codes.scales.astype(np.float64), format.group, axis=1)[:, : size[1]])
    inside = torch.from_numpy((codes.codes > 0) & (codes.codes < format.levels - 1))
    assert bool((own.abs() <= 0.501 * steps + 1e-4 * errors.abs().max())[inside].all())
    torch.testing.assert_close(passed_on(own.float(), rows).double(), errors, rtol=1e-3, atol=1e-4)


def test_errors_are_passed_on_as_least_squares_has_it() -> None:
    hessian = random_hessian(20, 6)
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(20, dtype=torch.float64)
    own, expected = torch.randn(20, 7, generator=torch.Generator().manual_seed(6)), torch.zeros(20, 7)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    for place, row in enumerate(order.tolist()):
        later = order[place + 1 :]
        expected[row] += own[row]
        if len(later):
            change = torch.linalg.solve(damped[later][:, later], damped[later][:, [row]]) @ own[row].double()[None]
            expected[later] -= change.float()
    torch.testing.assert_close(passed_on(own, row_order(hessian)), expected, rtol=1e-4, atol=1e-4)


def test_more_rows_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian, format = random_weight(45, 40, 2), random_hessian(45, 2), integer_format(4)
    whole = quantise_rows(torch.from_numpy(weight), row_order(hessian), format)
    assert len(weight) < gptq.BLOCK
    monkeypatch.setattr(gptq, "BLOCK", 16)
    codes = quantise_rows(torch.from_numpy(weight), row_order(hessian), format)
    assert (codes.codes != whole.codes).mean() < 0.01  # sums are rounded differently
    assert error(weight, codes, hessian) == pytest.approx(error(weight, whole, hessian), rel=0.02)
    assert error(weight, codes, hessian) < 0.5 * error(weight, round_to_nearest(weight, format), hessian)


def test_inputs_that_are_always_zero() -> None:
    weight, hessian = random_weight(12, 32, 3), random_hessian(12, 3)
    hessian[[2, 7]] = 0
    hessian[:, [2, 7]] = 0
    format = integer_format(4)
    codes, nearest = (
        quantise_rows(torch.from_numpy(weight), row_order(hessian), format),
        round_to_nearest(weight, format),
    )
    assert np.array_equal(codes.codes[[2, 7]], nearest.codes[[2, 7]])
    nothing = quantise_rows(torch.from_numpy(weight), row_order(torch.zeros(12, 12)), format)
    assert same(nothing, nearest)


def test_fewer_tokens_than_inputs() -> None:
    weight, hessian = random_weight(60, 64, 4), random_hessian(60, 4, tokens=7)
    codes = quantise_rows(torch.from_numpy(weight), row_order(hessian), integer_format(4))
    assert error(weight, codes, hessian) < error(weight, round_to_nearest(weight, integer_format(4)), hessian)


def test_the_weight_is_left_as_it_is() -> None:
    weight = torch.from_numpy(random_weight(10, 32, 5))
    before = weight.clone()
    quantise_rows(weight, row_order(random_hessian(10, 5)), integer_format(4))
    assert torch.equal(weight, before)


def test_inputs_that_are_not_finite() -> None:
    with pytest.raises(TdaError, match=r"^its inputs are not finite\. Check the checkpoint\.$"):
        row_order(torch.full((3, 3), float("nan")))


def test_a_matrix_that_is_no_hessian() -> None:
    message = r"^the Hessian of its inputs has no Cholesky factor\. Give more --sequences\.$"
    with pytest.raises(TdaError, match=message):
        row_order(torch.tensor([[1.0, 9.0], [9.0, 1.0]]))


def test_the_search_is_the_one_of_rounding_to_nearest() -> None:
    weight = random_weight(7, 64, 6)
    for format in (integer_format(4), integer_format(8)):
        expected = round_to_nearest(weight, format)
        for row in range(7):
            grouped = torch.from_numpy(weight[row]).view(2, 32)
            codes, scales, _ = search_groups(
                grouped, torch.ones(2, 32), format, torch.from_numpy(SHRINKS)[:, None], symmetric=False
            )
            assert np.array_equal(codes.flatten().numpy(), expected.codes[row])
            assert np.array_equal(scales.half().numpy(), expected.scales[row])


@settings(max_examples=25)
@given(
    outputs=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    format=formats,
    symmetric=st.booleans(),
    count=st.integers(1, 5),
)
def test_matrices_side_by_side(outputs: list[int], format: IntegerFormat, symmetric: bool, count: int) -> None:
    """The result is that of each matrix alone, up to rounding of products, also if ranks share the groups."""
    weights = [torch.from_numpy(random_weight(40, size, size)) for size in outputs]
    hessian = random_hessian(40, 6)
    rows, matrices = row_order(hessian), [LazyMatrix.of(weight) for weight in weights]
    sent: list[list[torch.Tensor]] = []

    class Sender(Ranks):
        """Keeps what a rank sends."""

        def side_by_side(self, own: torch.Tensor, sizes: Any) -> torch.Tensor:
            assert own.shape[1] == sizes[self.number]
            sent[-1].append(own)
            return own.new_zeros(len(own), sum(sizes), *own.shape[2:])

    class Receiver(Ranks):
        """Joins what all have sent."""

        def side_by_side(self, own: torch.Tensor, sizes: Any) -> torch.Tensor:
            return torch.cat([pieces.pop(0) for pieces in sent], dim=1)

    for number in range(count):
        sent.append([])
        quantise_together(matrices, rows, format, symmetric=symmetric, ranks=Sender(number, count))
    found = quantise_together(matrices, rows, format, symmetric=symmetric, ranks=Receiver(0, count))
    assert len(found) == len(weights)
    for weight, tensors in zip(weights, found, strict=True):
        codes, alone = tensors.pack().unpack(), quantise_rows(weight, rows, format, symmetric=symmetric)
        assert codes.codes.shape == weight.shape
        assert (codes.codes != alone.codes).mean() < 0.01
        assert error(weight.numpy(), codes, hessian) == pytest.approx(error(weight.numpy(), alone, hessian), rel=0.02)


def test_a_rank_reads_the_columns_that_it_rounds() -> None:
    weight, rows = torch.from_numpy(random_weight(40, 90, 0)), row_order(random_hessian(40, 0))
    read: list[tuple[int, int]] = []

    def columns(which: slice) -> torch.Tensor:
        read.append((which.start, which.stop))
        return weight[:, which]

    class Alone(Ranks):
        def side_by_side(self, own: torch.Tensor, sizes: Any) -> torch.Tensor:
            return own.new_zeros(len(own), sum(sizes), *own.shape[2:])

    for number in range(2):
        quantise_together([LazyMatrix(90, columns)], rows, integer_format(4), ranks=Alone(number, 2))
    assert read == [(0, 64), (64, 90)]  # three groups of 32: two and one
