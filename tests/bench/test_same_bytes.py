"""benchmarks/same_bytes.py searches for the sparsity at which a method reads the wanted bytes."""

from __future__ import annotations

import argparse
import math
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

    def measure(cell: Any) -> dict[str, Any]:
        asked.append(cell.sparsity)
        assert cell.share == "ffn_share"
        return {"ffn_share": 1 - slope * cell.sparsity + offset}

    row = same_bytes.at_same_bytes(same_bytes.Cell("tda", sparsity), 0.01, measure)
    assert (row["method"], row["sparsity"], row["asked"]) == ("tda", sparsity, asked[-1])
    assert asked[0] == sparsity
    assert row["miss"] == pytest.approx(row["ffn_share"] - (1 - sparsity))
    if 0 <= (sparsity + offset) / slope <= 0.95:
        assert abs(row["miss"]) <= 0.01
        same_bytes.require_same_bytes([row])


@given(
    sparsity=st.floats(0.1, 0.6),
    offset=st.floats(-0.1, 0.1),
    slope=st.floats(0.5, 1.3),
)
def test_kl_is_taken_between_two_settings(same_bytes: ModuleType, sparsity: float, offset: float, slope: float) -> None:
    """By the bytes of all linears. Here the logarithm of KL is linear in them, so interpolation is exact."""

    def measure(cell: Any) -> dict[str, Any]:
        share = min(1.0, 1 - slope * cell.sparsity + offset)
        return {"ffn_share": 0.1, "linear_share": share, "kl": math.exp(-5 * share)}

    cell = same_bytes.Cell("tda", sparsity, "linear_share")
    row = same_bytes.at_same_bytes(cell, 0.01, measure, between=True)
    if 0.05 <= (sparsity + offset) / slope <= 0.9:
        assert abs(row["miss"]) <= 0.01
        assert row["kl_at"] == pytest.approx(math.exp(-5 * (1 - sparsity)))


def test_kl_at_bytes_that_no_two_settings_are_around(same_bytes: ModuleType) -> None:
    points = [(0.4, 0.8), (0.6, 0.2), (0.9, 0.0)]
    assert same_bytes.kl_at(points, 0.5) == pytest.approx(0.4)
    assert same_bytes.kl_at(points, 0.4) == pytest.approx(0.8)
    assert same_bytes.kl_at(points, 0.75) == pytest.approx(0.1)  # a KL of 0 has no logarithm
    assert same_bytes.kl_at(points, 0.3) is None
    assert same_bytes.kl_at(points, 0.95) is None


def test_what_chooses_its_own_bytes_is_measured_once(same_bytes: ModuleType) -> None:
    asked: list[float | None] = []

    def measure(cell: Any) -> dict[str, Any]:
        asked.append(cell.sparsity)
        return {"ffn_share": 0.8}

    row = same_bytes.at_same_bytes(same_bytes.Cell("paper"), 0.01, measure)
    assert (row["asked"], row["miss"], asked) == (None, 0.0, [None])


def test_the_nearest_try_counts_where_none_is_near(same_bytes: ModuleType) -> None:
    shares = iter([0.60, 0.45, 0.47, 0.44, 0.56])
    cell = same_bytes.Cell("tda", 0.5)
    row = same_bytes.at_same_bytes(cell, 0.01, lambda cell: {"ffn_share": next(shares)}, first=0.55)
    assert row["ffn_share"] == 0.47
    assert next(shares, None) is None
    with pytest.raises(TdaError, match=r"read other bytes than was meant, see 'miss': tda at 0\.5\.$"):
        same_bytes.require_same_bytes([row])


def test_a_method_that_cannot_go_further_keeps_what_it_has(same_bytes: ModuleType) -> None:
    def measure(cell: Any) -> dict[str, Any]:
        if cell.sparsity > 1 / 3:
            raise UsageError("TT saves down rows alone.")
        return {"ffn_share": 0.74}

    row = same_bytes.at_same_bytes(same_bytes.Cell("tt", 0.3), 0.01, measure)
    assert (row["asked"], row["miss"]) == (0.3, pytest.approx(0.04))
    with pytest.raises(UsageError):
        same_bytes.at_same_bytes(same_bytes.Cell("tt", 0.4), 0.01, measure)


@pytest.mark.parametrize("tried", [[(0.5, 0.02), (0.52, 0.021)], [(0.5, 0.02), (0.52, 0.02)]], ids=["up", "flat"])
def test_what_hardly_changes_the_bytes_is_no_reason_to_jump(
    same_bytes: ModuleType, tried: list[tuple[float, float]]
) -> None:
    assert 0.52 < same_bytes.next_asked(tried) < 0.65


def test_rows_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = load("rows", monkeypatch)
    path = tmp_path / "rows.jsonl"
    row = {"method": "tda", "sparsity": 0.5, "kl": 0.1}
    assert rows.Rows(path, ("method", "sparsity")).add(row) == row
    kept = rows.Rows(path, ("method", "sparsity"))
    assert kept.get({"method": "tda", "sparsity": 0.5, "other": 1}) == row
    assert kept.get({"method": "tda", "sparsity": 0.3}) is None
    # Rows without all keys are ignored.
    assert rows.Rows(path, ("method", "sparsity", "artifact")).found == {}


def test_a_row_that_was_cut_off_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = load("rows", monkeypatch)
    path = tmp_path / "rows.jsonl"
    rows.Rows(path, ("method",)).add({"method": "tda"})
    path.write_text(path.read_text() + '{"method": "gri')
    kept = rows.Rows(path, ("method",))
    assert list(kept.found) == [("tda",)]
    kept.add({"method": "griffin"})
    assert list(rows.Rows(path, ("method",)).found) == [("tda",), ("griffin",)]
    path.write_text('{"method": "tda"}\n5\n')
    with pytest.raises(TdaError, match=r"rows\.jsonl, line 2: not a row\. Give another file with --rows\.$"):
        rows.Rows(path, ("method",))


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


def test_tasks_ask_each_method_of_its_own_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, cell = load("task_table", monkeypatch), load("same_bytes", monkeypatch).Cell
    options = argparse.Namespace(artifact=tmp_path / "masks", priced=tmp_path / "rows")
    assert tasks.folder_of(options, "griffin") == tasks.folder_of(options, "dense") == tmp_path / "masks"
    assert tasks.folder_of(options, "teal") == tmp_path / "rows"
    with pytest.raises(
        UsageError, match=r"^Method priced needs an artifact of --method priced\. Give it with --priced"
    ):
        tasks.folder_of(argparse.Namespace(artifact=tmp_path, priced=None), "priced")
    greedy = tmp_path / "d.json"
    asked = tasks.request(cell("teal", 0.4, "linear_share"), greedy)
    assert (asked.method, asked.sparsity, asked.parts, asked.densities) == ("teal", 0.4, "all", greedy)
    asked = tasks.request(cell("priced", 0.4, "ffn_share"), greedy)
    assert (asked.parts, asked.densities) == ("ffn", None)
    assert not tasks.request(cell("dense", None, "linear_share")).has_budget
