"""benchmarks/lookup.py on a tiny artifact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench.test_scripts import load


def test_rows(priced_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = load("lookup", monkeypatch)
    monkeypatch.setattr(script, "PROMPTS", {"sea": "the sea, the sea, the sea", "none": "a b"})
    options = ("--sparsity", 0.5, "--lookup", 3, "--new-tokens", 60, "--repeats", 1)
    monkeypatch.setattr("sys.argv", ["lookup.py", *map(str, (priced_artifact, *options)), "--json"])
    assert script.main() == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["text"], row["lookup"]) for row in rows] == [("sea", 0), ("sea", 3), ("none", 0), ("none", 3)]
    for row in rows:
        assert row["differing_tokens"] == 0
        assert row["steps"] + row["accepted"] == 59
        assert row["tokens_per_step"] == pytest.approx(59 / row["steps"])
    assert [row["drafted"] for row in rows if not row["lookup"]] == [0, 0]
    monkeypatch.setattr("sys.argv", ["lookup.py", *map(str, (priced_artifact, *options))])
    assert script.main() == 0
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_differing_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    script = load("lookup", monkeypatch)
    assert script.differing([1, 2, 3], [1, 2, 3]) == 0
    assert script.differing([1, 2, 3], [1, 4, 3, 5]) == 2


@pytest.mark.parametrize("option", [("--new-tokens", "1"), ("--repeats", "0")])
def test_bad_usage(
    option: tuple[str, str], priced_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load("lookup", monkeypatch)
    monkeypatch.setattr("sys.argv", ["lookup.py", str(priced_artifact), *option])
    assert script.main() == 2
    assert "Give --new-tokens of 2 or more" in capsys.readouterr().err
