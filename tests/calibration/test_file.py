"""The calibration file: written values are read back, and other files are refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import signal
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tda_export.calibration import file as calibration_file
from tda_export.calibration.budgets import Budget, allocate
from tda_export.calibration.cett import threshold_grid
from tda_export.calibration.curves import CurveAccumulator, CurveSums
from tda_export.calibration.file import (
    DIGEST_KEY,
    FORMAT,
    FORMAT_VERSION,
    KL,
    METADATA_KEY,
    Calibration,
    allocation_from,
    is_calibration,
    read_calibration,
    write_calibration,
)
from tda_export.calibration.kl_table import KlTable
from tda_export.errors import TdaError, UsageError
from tda_export.ffn_share import GATED

PROVENANCE: dict[str, Any] = {
    "model": {"name": "tiny", "architecture": "LlamaForCausalLM", "fingerprint": "f" * 64, "ffn_matrices": 3},
    "dataset": {"name": "builtin — ‘text’", "sequences": 2},
    "budget": {"cett": 0.2},
    "settings": {"prompt_tokens": 4, "seed": 0},
}


@pytest.fixture(params=["prompt", "token"])
def calibration(request: pytest.FixtureRequest) -> Calibration:
    grid = threshold_grid(50)
    accumulator = CurveAccumulator(2, 7, grid, request.param, prompt_tokens=4)
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        accumulator.add(layer, torch.randn(9, 7, generator=generator), torch.randn(3, 7, generator=generator))
    return Calibration(grid, accumulator.sums, PROVENANCE)


def kl_table() -> KlTable:
    """Make a path of two settings and two layers, without equal numbers."""
    values = 0.1 + 0.8 * torch.rand(8, 2, 2, generator=torch.Generator().manual_seed(1))
    kl, stderr, thresholds, token_thresholds, mask, token, cett, sensitivity = values
    columns = (kl.sort(dim=0).values, stderr, thresholds, token_thresholds, mask, mask * token, cett, sensitivity)
    return KlTable(torch.tensor([0.7, 0.4]), *columns, torch.tensor([64.0]))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tiny.safetensors"


def write_metadata(path: Path, metadata: str | None) -> None:
    """Write a safetensors file with this text in place of a calibration's provenance."""
    save_file({"grid": torch.zeros(4)}, path, metadata=None if metadata is None else {METADATA_KEY: metadata})


def test_round_trip(calibration: Calibration, path: Path) -> None:
    write_calibration(calibration, path)
    read = read_calibration(path)
    assert read.provenance == PROVENANCE
    assert read.model_fingerprint == "f" * 64
    assert read.kl is None
    assert torch.equal(read.grid, calibration.grid)
    for field in fields(CurveSums):
        actual, expected = getattr(read.sums, field.name), getattr(calibration.sums, field.name)
        assert torch.equal(actual, expected)
        assert actual.dtype == expected.dtype
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_round_trip_of_the_path(calibration: Calibration, path: Path) -> None:
    table = kl_table()
    write_calibration(dataclasses.replace(calibration, kl=table), path)
    read = read_calibration(path)
    assert read.kl is not None
    for field in fields(KlTable):
        assert torch.equal(getattr(read.kl, field.name), getattr(table, field.name)), field.name
    assert torch.equal(read.sums.ratio, calibration.sums.ratio)


@pytest.mark.parametrize("missing", [field.name for field in fields(KlTable)])
def test_a_path_without_all_of_it(calibration: Calibration, path: Path, missing: str) -> None:
    write_calibration(dataclasses.replace(calibration, kl=kl_table()), path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != KL + missing}  # noqa: SIM118
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(TdaError, match=rf"not a readable calibration \(.*{missing}"):
        read_calibration(path)


def test_file_is_plain_data(calibration: Calibration, path: Path) -> None:
    write_calibration(calibration, path)
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()[METADATA_KEY])
    assert len(metadata.pop(DIGEST_KEY)) == 64
    assert metadata == {"format": FORMAT, "format_version": FORMAT_VERSION, **PROVENANCE}


def test_writing_replaces_an_earlier_file(calibration: Calibration, path: Path) -> None:
    path.write_text("earlier")
    write_calibration(calibration, path)
    assert read_calibration(path).provenance == PROVENANCE


# Other files


def test_missing_file(path: Path) -> None:
    with pytest.raises(TdaError, match=r"tiny\.safetensors: no such calibration file\. Make one with 'tda-export cal"):
        read_calibration(path)


def test_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(TdaError, match="no such calibration file"):
        read_calibration(tmp_path)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, -1])
def test_truncated_file(calibration: Calibration, path: Path, kept: int) -> None:
    write_calibration(calibration, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(TdaError, match=r"not a readable calibration \(.+\)\. Run 'tda-export calibrate' again\.$"):
        read_calibration(path)


@pytest.mark.parametrize("metadata", [None, "{}", '{"format": "something else"}'])
def test_other_safetensors_file(path: Path, metadata: str | None) -> None:
    write_metadata(path, metadata)
    with pytest.raises(TdaError, match=r"not a calibration\. Give a file from 'tda-export calibrate'\.$"):
        read_calibration(path)


@pytest.mark.parametrize("metadata", ["{", "[]", "3", "null", '"text"'])
def test_damaged_provenance(path: Path, metadata: str) -> None:
    write_metadata(path, metadata)
    with pytest.raises(TdaError, match=r"not a (readable )?calibration"):
        read_calibration(path)


@pytest.mark.parametrize("version", [{}, {"format_version": "one"}, {"format_version": None}])
def test_damaged_version(path: Path, version: dict[str, Any]) -> None:
    write_metadata(path, json.dumps({"format": FORMAT, **version}))
    with pytest.raises(TdaError, match="not a readable calibration"):
        read_calibration(path)


def test_newer_format(path: Path) -> None:
    write_metadata(path, json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION + 1}))
    message = (
        rf"calibration format {FORMAT_VERSION + 1} is newer than this tda-export \({FORMAT_VERSION}\)\. Update it\.$"
    )
    with pytest.raises(TdaError, match=message):
        read_calibration(path)


def test_older_format(path: Path) -> None:
    write_metadata(path, json.dumps({"format": FORMAT, "format_version": 1}))
    message = rf"format 1 is older than .*\({FORMAT_VERSION}\)\. Run 'tda-export calibrate' again"
    with pytest.raises(TdaError, match=message):
        read_calibration(path)


@pytest.mark.parametrize("missing", ["grid", *(field.name for field in fields(CurveSums))])
def test_missing_tensor(calibration: Calibration, path: Path, missing: str) -> None:
    tensors = {field.name: getattr(calibration.sums, field.name) for field in fields(CurveSums)}
    tensors["grid"] = calibration.grid
    del tensors[missing]
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, **PROVENANCE}
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(metadata)})
    with pytest.raises(TdaError, match=rf"not a readable calibration \(.*{missing}"):
        read_calibration(path)


@pytest.mark.parametrize(
    "change",
    [
        {"model": None},
        {"model": "tiny"},
        {"model": {"name": "tiny"}},
        {"model": {"fingerprint": "f" * 64}},
        {"budget": None},
        {"budget": 0.2},
        {"budget": {"cett": "much"}},
        {"budget": {"cett": 0.2, "unheard-of": 1}},
        {"budget": {}},
        {"budget": {"cett": 5}},
        {"budget": {"sparsity": 0.5, "allocation": "unheard-of"}},
    ],
    ids=str,
)
def test_damaged_record_names_the_file(calibration: Calibration, path: Path, change: dict[str, Any]) -> None:
    write_calibration(Calibration(calibration.grid, calibration.sums, PROVENANCE | change), path)
    with pytest.raises(TdaError, match=r"tiny\.safetensors: not a readable calibration \(.+\)\. Run 'tda-export cal"):
        read_calibration(path)


@pytest.mark.parametrize("missing", ["model", "budget"])
def test_record_without_what_build_needs(calibration: Calibration, path: Path, missing: str) -> None:
    provenance = {name: value for name, value in PROVENANCE.items() if name != missing}
    write_calibration(Calibration(calibration.grid, calibration.sums, provenance), path)
    with pytest.raises(TdaError, match=rf"tiny\.safetensors: not a readable calibration \('{missing}'\)"):
        read_calibration(path)


# Checks of a build


@pytest.mark.parametrize("budget", [Budget(cett=0.2), Budget(sparsity=0.5, allocation="uniform")], ids=str)
def test_thresholds_of_a_file_are_those_of_its_curves(calibration: Calibration, path: Path, budget: Budget) -> None:
    write_calibration(calibration, path)
    thresholds = allocation_from(path, budget).thresholds
    assert thresholds == allocate(budget, calibration.sums, calibration.grid, ffn_matrices=GATED).thresholds
    assert len(thresholds) == 2
    assert set(thresholds) <= set(calibration.grid.tolist())


def test_thresholds_of_a_missing_file(path: Path) -> None:
    with pytest.raises(TdaError, match=r"tiny\.safetensors: no such calibration file"):
        allocation_from(path, Budget(cett=0.2))


@pytest.mark.parametrize("budget", [Budget(sparsity=0.4), Budget(max_kl=0.3)], ids=str)
def test_budget_by_kl_of_a_file(calibration: Calibration, path: Path, budget: Budget) -> None:
    write_calibration(dataclasses.replace(calibration, kl=kl_table()), path)
    expected = allocate(budget, calibration.sums, calibration.grid, kl_table(), ffn_matrices=GATED)
    assert allocation_from(path, budget) == read_calibration(path).allocate(budget) == expected
    assert expected.token_thresholds
    write_calibration(calibration, path)
    with pytest.raises(UsageError, match="contains only CETT curves"):
        allocation_from(path, budget)


def test_a_calibration_is_told_by_its_content(calibration: Calibration, path: Path) -> None:
    write_calibration(calibration, path)
    assert is_calibration(path)
    assert is_calibration(path.rename(path.with_suffix(".other")))


@pytest.mark.parametrize("version", [0, FORMAT_VERSION, FORMAT_VERSION + 1, None])
def test_a_calibration_of_any_version_is_one(path: Path, version: int | None) -> None:
    write_metadata(path, json.dumps({"format": FORMAT, "format_version": version}))
    assert is_calibration(path)


@pytest.mark.parametrize("metadata", [None, "", "{", "[]", "3", "null", '"text"', "{}", '{"format": "another"}'])
def test_other_safetensors_is_no_calibration(path: Path, metadata: str | None) -> None:
    write_metadata(path, metadata)
    assert not is_calibration(path)


def test_other_files_are_no_calibration(path: Path) -> None:
    assert not is_calibration(path)  # it does not exist
    assert not is_calibration(path.parent)
    for content in (b"", b"text", bytes(100)):
        path.write_bytes(content)
        assert not is_calibration(path)


# Whole or not at all


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Let no file grow over 4 KiB. safetensors then fails as on a full disk.

    Use it around the call alone, because pytest's own output may go to a file.
    """
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_leaves_nothing(path: Path) -> None:
    accumulator = CurveAccumulator(1, 7, threshold_grid(2000), "prompt", prompt_tokens=4)
    accumulator.add(0, torch.randn(9, 7), torch.randn(3, 7))
    calibration = Calibration(threshold_grid(2000), accumulator.sums, PROVENANCE)
    with pytest.raises(TdaError, match=r"tiny\.safetensors: could not be written \(.*File too large"), full_disk():
        write_calibration(calibration, path)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, os.strerror(28)), KeyboardInterrupt()])
def test_failed_writing_leaves_the_earlier_file(
    calibration: Calibration, path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_written(tensors: object, part: Path, metadata: object) -> None:
        part.write_bytes(b"half")
        raise error

    path.write_text("earlier")
    monkeypatch.setattr(calibration_file, "save_file", half_written)
    expected = TdaError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left on device" if expected is TdaError else None):
        write_calibration(calibration, path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.read_text() == "earlier"
