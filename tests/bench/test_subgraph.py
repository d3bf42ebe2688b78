"""`benchmarks/subgraph.py` with random weights of a tiny shape, and with an artifact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from tda_export.models.source import ModelSource
from tests.bench.test_kv_cache import shape  # noqa: F401
from tests.bench.test_scripts import load
from tests.graph.test_priced import build_priced, source_of  # noqa: F401


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> list[dict[str, object]]:
    done = CliRunner().invoke(load("subgraph", monkeypatch).main, [*map(str, arguments), "--rounds", "2"])
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(lines: list[dict[str, object]]) -> None:
    for line in lines:
        assert line["ratio"] > 0  # type: ignore[operator]
        assert all(line[way]["ms"] > 0 for way in ("subgraph", "node by node"))  # type: ignore[index]


def test_a_shape(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("TDA_EXPORT_THREADS", "1")  # which the script sets
    lines = run(monkeypatch, "--shape", shape, "--threads", 2)
    assert [line.get("rows") for line in lines] == ["1.00", "0.70", "0.50", None]
    check(lines)


def test_an_artifact(
    source_of: Callable[[str], ModelSource],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    artifact = build_priced(source_of("llama"), tmp_path / "artifact", "sites")
    lines = run(monkeypatch, artifact, "--price", "0", "--price", "0.5", "--context", "5")
    assert [line.get("rows") for line in lines] == ["price 0", "price 0.5", None]
    check(lines)


def test_one_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(load("subgraph", monkeypatch).main, [])
    assert done.exit_code == 2
    assert "Give ARTIFACT or --shape." in done.output
