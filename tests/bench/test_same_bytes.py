"""Methods are compared at the same bytes: another sparsity is asked for until what is read is what was meant."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tda_export.errors import TdaError, UsageError
from tests.bench.test_scripts import load


@pytest.fixture(scope="module")
def same_bytes() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        return load("same_bytes", patch)


@given(
    sparsity=st.floats(0.1, 0.8),
    offset=st.floats(-0.15, 0.15),
    slope=st.floats(0.7, 1.3),
)
def test_what_reads_other_bytes_is_asked_again(
    same_bytes: ModuleType, sparsity: float, offset: float, slope: float
) -> None:
    asked: list[float] = []

    def measure(cells: list[Any]) -> list[dict[str, Any]]:
        asked.extend(cell.sparsity for cell in cells)
        return [{"ffn_share": 1 - slope * cell.sparsity + offset} for cell in cells]

    [row] = same_bytes.at_same_bytes([same_bytes.Cell("tda", sparsity)], 0.01, measure)
    assert (row["method"], row["sparsity"], row["asked"]) == ("tda", sparsity, asked[-1])
    assert asked[0] == sparsity
    reachable = 0 <= (sparsity + offset) / slope <= 0.95
    assert not reachable or row["ffn_share"] == pytest.approx(1 - sparsity, abs=0.01)


def test_only_those_that_miss_are_measured_again(same_bytes: ModuleType) -> None:
    calls = []

    def measure(cells: list[Any]) -> list[dict[str, Any]]:
        calls.append([cell.method for cell in cells])
        misses = {"cats": 0.02, "static": 0.0, "paper": 0.0}
        return [{"ffn_share": 1 - (cell.sparsity or 0.2) + misses[cell.method]} for cell in cells]

    cells = [same_bytes.Cell("static", 0.5), same_bytes.Cell("cats", 0.5), same_bytes.Cell("paper")]
    static, cats, paper = same_bytes.at_same_bytes(cells, 0.01, measure)
    assert calls == [["static", "cats", "paper"], ["cats"]]
    assert (static["asked"], paper["asked"]) == (0.5, None)
    assert cats["asked"] == pytest.approx(0.52)
    assert cats["ffn_share"] == pytest.approx(0.5)


def test_the_nearest_try_counts_where_none_is_near(same_bytes: ModuleType) -> None:
    shares = iter([0.60, 0.45, 0.47, 0.44, 0.56])
    [row] = same_bytes.at_same_bytes(
        [same_bytes.Cell("tda", 0.5)], 0.01, lambda cells: [{"ffn_share": next(shares)}], first=0.55
    )
    assert row["ffn_share"] == 0.47
    assert next(shares, None) is None


def test_rows_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = load("rows", monkeypatch)
    path = tmp_path / "rows.jsonl"
    row = {"method": "tda", "sparsity": 0.5, "kl": 0.1}
    assert rows.Rows(path, ("method", "sparsity")).add(row) == row
    assert rows.Rows(path, ("method", "sparsity")).found == {("tda", 0.5): row}


@pytest.mark.parametrize(("error", "status"), [(UsageError("no."), 2), (TdaError("no."), 1)])
def test_what_came_before_an_error_is_printed(
    error: TdaError, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = load("rows", monkeypatch)

    def come() -> Iterator[dict[str, Any]]:
        yield {"kl": 0.1}
        raise error

    assert rows.print_rows(come()) == status
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ('{"kl": 0.1}\n', "Error: no.\n")
