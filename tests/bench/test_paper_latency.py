"""`benchmarks/paper_latency.py` with models of tiny shapes, on the CPU."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tda_export.bench import decode
from tda_export.bench.shapes import SHAPES
from tda_export.errors import TdaError
from tda_export.runtime.artifact import open_artifact
from tests.bench.test_bench import SMALL
from tests.bench.test_scripts import load

SHAPE = "llama-2-7b"
TOKENS = ("--prompt-tokens", "64", "--new-tokens", "32")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with a tiny shape under the name of a model. It builds in this process and measures on the CPU."""
    found = load("paper_latency", monkeypatch)
    monkeypatch.setitem(SHAPES, SHAPE, SMALL)
    run_bench = decode.run_bench

    def build(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        run(found, *command[2:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(found, "subprocess", SimpleNamespace(run=build))
    monkeypatch.setattr(decode, "run_bench", lambda artifact, provider, *rest: run_bench(artifact, "cpu", *rest))
    return found


def run(script: ModuleType, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["paper_latency.py", *map(str, arguments)])
        script.main()


def test_artifacts_are_built_measured_and_deleted_one_by_one(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[list[str], int]] = []
    latency = script.latency

    def watched(shape: str, part: str, folder: Path, *tokens: int) -> dict[str, Any]:
        artifacts = [path.parent.name for path in tmp_path.rglob("manifest.json")]
        seen.append((artifacts, len(capsys.readouterr().out.splitlines())))
        result: dict[str, Any] = latency(shape, part, folder, *tokens)
        return result

    monkeypatch.setattr(script, "latency", watched)
    parts = [word for part in ("masks", "priced", "int4") for word in ("--part", part)]
    run(script, tmp_path, "--shape", SHAPE, *parts, *TOKENS, "--json")
    assert seen == [([f"{SHAPE}-masks"], 0), ([f"{SHAPE}-priced"], 1), ([f"{SHAPE}-int4"], 1)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("part", "methods"),
    [
        ("masks", ["dense", "tt", "griffin", "tda", "two_levels"]),
        ("priced", ["dense", "dense_native", "priced_0.70", "priced_0.50"]),
        ("int4", ["dense_native", "priced_0.70", "priced_0.50"]),
    ],
)
def test_figures_of_a_part(
    part: str, methods: list[str], script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(script, tmp_path, "--shape", SHAPE, "--part", part, *TOKENS, "--json")
    printed = json.loads(capsys.readouterr().out)
    assert printed["shape"] == SHAPE
    result = printed[part]
    rows = dict(script.rows_of(result))
    assert list(rows) == methods
    for row in rows.values():
        assert row["seconds"] == pytest.approx((row["prefill_ms"] + 32 * row["ms_per_token"]) / 1e3)
        assert row["ceiling_ms"] == pytest.approx(row["bytes_per_token"] / result["copy_gb_per_second"] / 1e6)
        assert row["paper_a100_seconds"] is None  # since the paper has other numbers of tokens
    if part != "masks":
        shares = [rows[name]["sparsity"] for name in methods[-2:]]
        assert shares == pytest.approx([0.3, 0.5], abs=0.02)


def test_the_paper_stands_beside_its_own_numbers_of_tokens(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prefill_ms": 500.0, "ms_per_token": 2.0, "bytes_per_token": 6e9, "share_of_copy_bandwidth": 1.0}
    row |= {"sparsity": 0.0}
    result = {"device": "a GPU", "copy_gb_per_second": 3000.0, "dense": row, "two_levels": dict(row)}
    monkeypatch.setattr(decode, "run_bench", lambda *arguments: result)
    run(script, tmp_path, "--shape", SHAPE, "--part", "masks")
    title, _, dense, two_levels = (line.split() for line in capsys.readouterr().out.splitlines())
    assert " ".join(title) == "llama-2-7b, masks, a GPU, copy 3,000 GB/s"
    assert dense == ["dense", "2.55", "80.31", "2.00", "2.00", "1.00", "0.00"]
    assert two_levels == ["two_levels", "2.55", "2.00", "2.00", "1.00", "0.00"]


def test_artifacts_that_are_there_are_used_and_kept(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = ("--part", "masks", "--part", "int4")
    for _ in range(2):  # the second time there is nothing to build
        run(script, tmp_path, "--shape", SHAPE, *parts, "--build-only")
    assert open_artifact(tmp_path / f"{SHAPE}-int4").matrices["layers.0.ffn.down"].format.name == "int4_g32"
    monkeypatch.setattr(script, "build", None)
    run(script, tmp_path, "--shape", SHAPE, *parts, *TOKENS)
    assert capsys.readouterr().out.count("copy") == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{SHAPE}-int4", f"{SHAPE}-masks"]


def test_an_artifact_of_another_model(script: ModuleType, tmp_path: Path) -> None:
    run(script, tmp_path, "--shape", SHAPE, "--part", "masks", "--build-only")
    (tmp_path / f"{SHAPE}-masks").rename(tmp_path / "gemma-2b-masks")
    with pytest.raises(TdaError, match=r"gemma-2b-masks: an artifact of llama-2-7b, float16\. Delete it\.$"):
        script.latency("gemma-2b", "masks", tmp_path, 64, 32)


def test_an_artifact_that_cannot_be_built(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other parts are measured."""
    build = script.subprocess.run

    def failing(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1) if "masks" in command else build(command, **options)

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=failing))
    with pytest.raises(SystemExit, match=r"^Failed: llama-2-7b, masks\.$"):
        run(script, tmp_path, "--shape", SHAPE, "--part", "masks", "--part", "int4", *TOKENS, "--json")
    printed = capsys.readouterr()
    message = "TdaError: llama-2-7b, masks: the artifact was not built. The reason stands above."
    assert message in printed.err
    assert list(json.loads(printed.out)) == ["shape", "int4"]
    assert list(tmp_path.iterdir()) == []


def test_the_command_builds_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script understands the command line that it starts itself with."""
    script = load("paper_latency", monkeypatch)
    commands: list[list[str]] = []

    def done(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=done))
    built: list[tuple[str, str, Path]] = []
    monkeypatch.setattr(script, "build", lambda *arguments: built.append(arguments))
    with script.with_artifact("opt-2.7b", "priced", tmp_path) as folder:
        run(script, *commands[0][2:])
    assert built == [("opt-2.7b", "priced", folder)]
