"""The rounding of rows on a GPU: the Triton kernel against the reference, and runs without it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tda_export.models.source import ModelSource
from tda_export.quantization import run
from tda_export.quantization.gptq import block_rounding, quantise_rows, round_block, row_order, why_slow
from tda_export.quantization.run import quantize
from tda_export.quantization.settings import QuantizeSettings
from tda_export.weights.formats import INTEGER_FORMATS, IntegerFormat, integer_format
from tda_export.weights.plan import read_rules
from tests.calibration.shown import Shown
from tests.quantization.test_gptq import error, formats, random_hessian, random_weight
from tests.quantization.test_run import CORPUS, SETTINGS

GPU = torch.device("cuda", 0)


class Stop(Exception):
    pass


def stop(*arguments: object) -> None:
    raise Stop


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    why_slow.cache_clear()
    yield
    why_slow.cache_clear()


@pytest.mark.gpu
@settings(max_examples=30, deadline=None)
@given(
    format=formats,
    rows=st.sampled_from([1, 2, 7, 64, 100, 128]),
    groups=st.integers(1, 9),
    padding=st.integers(0, 31),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_kernel_rounds_as_the_reference(
    format: IntegerFormat, rows: int, groups: int, padding: int, symmetric: bool, seed: int
) -> None:
    factor = row_order(random_hessian(rows, seed)).factor.to(GPU)
    columns = groups * format.group
    block = torch.from_numpy(random_weight(rows, columns, seed)).to(GPU)
    counts = torch.ones(columns, device=GPU)
    counts[columns - padding :] = 0
    rounding = block_rounding(GPU, format, symmetric)
    found = rounding(block.clone(), factor, counts, format, symmetric=symmetric)
    expected = round_block(block.clone(), factor, counts, format, symmetric=symmetric)
    assert rounding is not round_block
    # A sum that is rounded differently can move an element over the middle of two codes, and change later rows. With 8
    # bits and groups of 128, 17 % of the groups had such an element once.
    differs = found[0] != expected[0]
    touched = differs.any(dim=2)
    assert int(differs.sum()) <= 1 + 0.02 * differs.numel()
    assert int(touched.sum()) <= 1 + 0.25 * touched.numel()
    decoded = [(c.float() - z.float()[..., None]) * s.float()[..., None] for c, s, z, _ in (found, expected)]
    scale = expected[1].float().max()
    assert float((decoded[0] - decoded[1]).abs().mean()) < 0.05 * float(scale)


@pytest.mark.gpu
@pytest.mark.parametrize("format", INTEGER_FORMATS.values(), ids=lambda format: format.name)
def test_a_matrix_on_a_gpu(format: IntegerFormat) -> None:
    """More rows than a block, and a last group that is not whole."""
    weight, hessian = torch.from_numpy(random_weight(300, 200, 7)), random_hessian(300, 7, tokens=900)
    on_cpu = quantise_rows(weight, row_order(hessian), format)
    on_gpu = quantise_rows(weight.to(GPU), row_order(hessian.to(GPU)), format)
    assert (on_cpu.codes != on_gpu.codes).mean() < 0.05
    assert error(weight.numpy(), on_gpu, hessian) == pytest.approx(error(weight.numpy(), on_cpu, hessian), rel=0.02)


@pytest.mark.usefixtures("fresh_choice")
def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tda_export.quantization.gptq_triton", None)
    formats = frozenset(INTEGER_FORMATS.values())
    assert why_slow(torch.device("cpu"), formats, False) is None
    assert "gptq_triton" in str(why_slow(GPU, formats, False))
    assert why_slow(GPU, frozenset(), False) is None
    assert block_rounding(GPU, integer_format(4), False) is round_block


def test_the_user_is_told(tiny: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "why_slow", lambda device, formats, symmetric: "No module named 'triton'")
    lines: list[str] = []
    rounded = {"quantizer": "rtn", "bits_per_weight": 6.0}  # GPTQ's rounding is not used
    quantize(tiny, CORPUS, QuantizeSettings(**{**vars(SETTINGS), **rounded}), show=Shown(), notify=lines.append)
    assert lines == []
    quantize(tiny, CORPUS, SETTINGS, show=Shown(), notify=lines.append)
    assert lines == [
        "Triton's kernel cannot run (No module named 'triton'), so rounding takes several times as long. Triton needs "
        "a C compiler and Python's header files."
    ]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {"int4_g32", "int8_g32"}),
        ({"head": "whole"}, {"int4_g32"}),
        ({"weights": "int8"}, {"int8_g32"}),
        ({"rules": read_rules(["layers.*.up=int8_g64,head=int4_g128"])}, {"int4_g32", "int8_g64", "int4_g128"}),
        ({"rules": read_rules(["layers.*=float"])}, {"int8_g32"}),
        ({"rules": read_rules(["layers.*=float,head=float"])}, set()),
        ({"bits_per_weight": 6.0}, {"int4_g32", "int8_g32"}),
    ],
)
def test_kernels_are_compiled_for_what_gptq_rounds(
    options: dict[str, Any], names: set[str], tiny: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedding, and a head by token, are rounded to nearest; a mixture may have linears in either format."""
    asked: list[frozenset[IntegerFormat]] = []
    monkeypatch.setattr(run, "why_slow", lambda device, formats, symmetric: asked.append(formats))
    monkeypatch.setattr(run, "float_log_probabilities", stop)
    with pytest.raises(Stop):
        quantize(tiny, CORPUS, QuantizeSettings(**{**vars(SETTINGS), **options}), show=Shown())
    assert [{format.name for format in formats} for formats in asked] == [names]
