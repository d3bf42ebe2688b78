"""The timing of RowLinear checks results, counts the bytes read, and refuses forms that it cannot time."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from tda_export.bench import row_kernel
from tda_export.bench.row_kernel import Matrices, main, measure_rows
from tda_export.errors import TdaError
from tda_export.runtime.providers import CPU


@pytest.fixture(autouse=True)
def few_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_kernel, "MOST_LAYERS", 4)
    monkeypatch.setattr(row_kernel, "copy_bandwidth", lambda provider: 10.0)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["row_kernel", *arguments])
    main()


def test_rows_and_bytes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    call(monkeypatch, "--provider", "cpu", "--shape", "40x24", "--density", "1", "0.25", "--json")
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["kernel"] for row in rows] == ["MatMul", *["RowLinear", "RowLinear, price late"] * 2]
    assert [row["density"] for row in rows] == [1, 1, 1, 0.25, 0.25]
    for row in rows:
        assert row["gb_per_second"] * 1e3 * row["us"] == pytest.approx(40 * row["density"] * 24 * 4)
        assert row["fixed_us"] == pytest.approx(row["us"] * (1 - row["share"]))
    call(monkeypatch, "--provider", "cpu", "--shape", "40x24", "--density", "0.25")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "CPU, float32, weights float32, copy 10 GB/s"
    assert len(lines) == 4


@pytest.mark.parametrize(("bits", "row_bytes"), [(4, 12 + 2 + 1), (8, 24 + 2 + 1)])
def test_rows_of_integers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bits: int, row_bytes: int
) -> None:
    shape = ["--provider", "cpu", "--shape", "40x24", "--density", "0.25"]
    call(monkeypatch, *shape, "--weights", f"int{bits}", "--group", "64", "--json")
    result = json.loads(capsys.readouterr().out)
    assert result["weights"] == f"int{bits}_g64"
    assert [row["kernel"] for row in result["rows"]] == [f"RowLinear{bits}", f"RowLinear{bits}, price late"]
    for row in result["rows"]:
        assert row["gb_per_second"] * 1e3 * row["us"] == pytest.approx(10 * row_bytes)


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = Matrices(8, 8, "float32", CPU)
    monkeypatch.setattr(matrices, "reference", lambda layer, price: torch.ones(8))
    with pytest.raises(TdaError, match=r"RowLinear: matrix 0 is .* from PyTorch's result, so nothing was timed"):
        measure_rows(matrices, 0.5, 10.0, kernel="RowLinear")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "40"], "'40' is not a shape; write INPUTSxOUTPUTS, such as 4096x22016"),
        (["--shape", "0x4"], "'0x4' is not a shape"),
        (["--density", "0"], "'0' is not a fraction of rows; give a number above 0, up to 1"),
        (["--density", "many"], "'many' is not a fraction of rows"),
        (["--provider", "cpu", "--dtype", "fp16"], "The kernel on the CPU is float32. Use --dtype fp32."),
        (["--provider", "cpu", "--dtype", "bf16"], "The CPU does not run bfloat16"),
    ],
)
def test_what_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, *arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
