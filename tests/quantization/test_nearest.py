"""Rounding a matrix in pieces, by several threads or on a device, is rounding it whole by NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from tda_export.errors import TdaError
from tda_export.models.source import ModelSource
from tda_export.quantization import nearest, nearest_on_device, run
from tda_export.quantization.code_tensors import CodeTensors
from tda_export.quantization.nearest import round_matrix
from tda_export.quantization.settings import QuantizeSettings
from tda_export.ranks import ALONE
from tda_export.weights.formats import INTEGER_FORMATS, IntegerFormat, integer_format
from tda_export.weights.integers import FIELDS, Codes, round_to_nearest


def same(found: Codes, expected: Codes) -> None:
    assert found.format == expected.format
    for field in FIELDS:
        one, other = getattr(found, field), getattr(expected, field)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("elements", [1, 300, 1 << 22])
@pytest.mark.parametrize("format", [integer_format(4), integer_format(8, 64)], ids=lambda format: format.name)
def test_pieces_are_the_whole(format: IntegerFormat, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "ELEMENTS_AT_ONCE", elements)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    rows = np.random.default_rng(0).standard_normal((37, 83)).astype(np.float32)
    for symmetric in (False, True):
        found, expected = (
            round_matrix("w", torch.from_numpy(rows), format, symmetric=symmetric),
            round_to_nearest(rows, format, symmetric=symmetric),
        )
        same(found, expected)


@given(
    format=st.sampled_from(list(INTEGER_FORMATS.values())),
    size=st.tuples(st.integers(1, 9), st.integers(1, 150)),
    seed=st.integers(0, 9),
)
def test_decoding_in_pytorch_gives_the_same_bits(format: IntegerFormat, size: tuple[int, int], seed: int) -> None:
    rows = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    codes = round_to_nearest(rows, format)
    tensors = CodeTensors.of(codes)
    found, packed = tensors.decode(), tensors.pack()
    assert found.is_contiguous()
    assert all(np.array_equal(mine, its) for mine, its in zip(packed.tensors, codes.pack(), strict=True))
    assert all(np.array_equal(getattr(packed.unpack(), field), getattr(codes, field)) for field in FIELDS)
    np.testing.assert_array_equal(found.numpy(), codes.decode())


def weights(kind: str, size: tuple[int, int], seed: int) -> np.ndarray:
    """Weights as models have them, and others: with ties, of one sign, tiny, and too large for a scale."""
    random = np.random.default_rng(seed)
    normal = random.standard_normal(size).astype(np.float32)
    made = {
        "normal": normal,
        "bfloat16": torch.from_numpy(normal).bfloat16().float().numpy(),
        "ties": random.integers(-3, 4, size).astype(np.float32) / 2,
        "zeros": np.zeros(size, np.float32),
        "positive": np.abs(normal) + 1,
        "negative": -np.abs(normal) - 1,
        "outliers": np.where(random.random(size) < 0.02, 50 * normal, normal),
        "tiny": normal * np.float32(1e-8),
        "denormal": normal * np.float32(1e-40),
        "huge": normal * np.float32(3e37),
    }
    return made[kind].astype(np.float32)


@given(
    format=st.sampled_from(list(INTEGER_FORMATS.values())),
    kind=st.sampled_from(
        ["normal", "bfloat16", "ties", "zeros", "positive", "negative", "outliers", "tiny", "denormal", "huge"]
    ),
    size=st.tuples(st.integers(1, 20), st.integers(1, 400)),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
@example(format=integer_format(8, 32), kind="normal", size=(300, 576), symmetric=False, seed=0)
@example(format=integer_format(4, 128), kind="outliers", size=(70, 1000), symmetric=True, seed=0)
def test_pytorch_rounds_to_the_same_bits(
    format: IntegerFormat, kind: str, size: tuple[int, int], symmetric: bool, seed: int
) -> None:
    assume(size[0] * format.groups(size[1]) > 1)  # NumPy adds the squares of a single group in another order
    rows = weights(kind, size, seed)
    found = nearest_on_device.round_to_nearest(torch.from_numpy(rows), format, symmetric=symmetric)
    same(found, round_to_nearest(rows, format, symmetric=symmetric))


@pytest.mark.gpu
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("format", INTEGER_FORMATS.values(), ids=lambda format: format.name)
@pytest.mark.parametrize("kind", ["normal", "bfloat16", "ties", "outliers", "tiny"])
def test_a_gpu_rounds_to_the_same_bits(
    kind: str, format: IntegerFormat, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest, "ELEMENTS_AT_ONCE", 1 << 18)
    rows = torch.from_numpy(weights(kind, (1000, 1000), 1))
    expected = round_matrix("w", rows, format, symmetric=symmetric)
    same(round_matrix("w", rows, format, symmetric=symmetric, device="cuda"), expected)
    same(round_matrix("w", rows.cuda(), format, symmetric=symmetric), expected)


@pytest.mark.parametrize(("elements", "counts"), [(1, [1] * 37), (10 * 83, [10, 10, 10, 7]), (1 << 22, [37])])
def test_a_device_gets_pieces(elements: int, counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece is at most the allowed size, or one row."""
    format, rows = integer_format(4), np.random.default_rng(0).standard_normal((37, 83)).astype(np.float32)
    whole = round_to_nearest(rows, format)
    left, sizes = iter(range(37)), []

    def rounded(piece: torch.Tensor, format: IntegerFormat, *, symmetric: bool) -> Codes:
        assert piece.device.type == "meta"
        sizes.append(len(piece))
        own = [next(left) for _ in range(len(piece))]
        return Codes(format, whole.codes[own], whole.scales[own], whole.zero_points[own])

    monkeypatch.setattr(nearest, "ELEMENTS_AT_ONCE", elements)
    monkeypatch.setattr(nearest_on_device, "round_to_nearest", rounded)
    same(round_matrix("w", torch.from_numpy(rows), format, symmetric=False, device="meta"), whole)
    assert sizes == counts


def test_weights_that_cannot_be_rounded() -> None:
    rows = torch.ones(3, 40)
    rows[1, 2] = float("inf")
    with pytest.raises(TdaError, match=r"^head: the checkpoint has weights that are not finite\. Download the w"):
        round_matrix("head", rows, integer_format(8), symmetric=False)
    rows[1, 2] = 3e7
    with pytest.raises(TdaError, match=r"^head: some weights are too large for scales of int8_g32, which are float16"):
        round_matrix("head", rows, integer_format(8), symmetric=False)


def test_embedding_and_head_are_rounded_on_the_device(tiny: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, tuple[torch.device, str]] = {}

    def rounded(name: str, rows: torch.Tensor, format: IntegerFormat, *, symmetric: bool, device: str) -> Codes:
        found[name] = (rows.device, device)
        return round_matrix(name, rows, format, symmetric=symmetric)

    monkeypatch.setattr(run, "round_matrix", rounded)
    settings, none = QuantizeSettings(quantizer="rtn", kl_sequences=0), torch.zeros(0, 24, dtype=torch.int64)
    alone = run._Run(tiny, settings.plan(tiny.spec), settings, "cuda:1", None, none, none, None, ALONE)
    alone.begin()
    alone.head()
    assert found == dict.fromkeys(("embedding", "head"), (torch.device("cpu"), "cuda:1"))
