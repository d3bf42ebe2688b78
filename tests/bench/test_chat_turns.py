"""benchmarks/chat_turns.py on a tiny artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.bench.test_scripts import load


def turns(script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    monkeypatch.setattr("sys.argv", ["chat_turns.py", *map(str, arguments)])
    assert script.main() == 0
    return capsys.readouterr().out


def test_both_ways_read_the_same_chat(
    priced_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load("chat_turns", monkeypatch)
    monkeypatch.setattr(script, "MESSAGES", ("The sea", "Why?", "And the moon?"))
    options = (priced_artifact, "--new-tokens", 10, "--repeats", 1, "--json")
    first, *later, whole = map(json.loads, turns(script, monkeypatch, capsys, *options).splitlines())
    assert first["keep_kl"] == pytest.approx(first["reread_kl"])  # no answer has been kept yet
    assert first["keep_read_tokens"] == first["reread_read_tokens"] == first["prompt_tokens"]
    assert any(row["keep_read_tokens"] < row["reread_read_tokens"] for row in later)
    assert all(row[f"{name}_{what}"] > 0 for row in later for name in ("keep", "reread") for what in ("kl", "seconds"))
    for name in ("keep", "reread"):
        tokens = sum(row["answer_tokens"] for row in later)
        expected = sum(row[f"{name}_kl"] * row["answer_tokens"] for row in later) / tokens
        assert whole[f"{name}_kl"] == pytest.approx(expected)
    assert whole["kl_difference"] == pytest.approx(whole["keep_kl"] - whole["reread_kl"])
    assert whole["share"] == pytest.approx(0.5, abs=0.02)
    dense = turns(script, monkeypatch, capsys, *options, "--price", 0).splitlines()
    for row in map(json.loads, dense):
        assert abs(row["keep_kl"]) < 1e-6 > abs(row["reread_kl"])


def test_for_people(priced_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = load("chat_turns", monkeypatch)
    monkeypatch.setattr(script, "MESSAGES", ("The sea", "Why?"))
    printed = turns(script, monkeypatch, capsys, priced_artifact, "--new-tokens", 5, "--repeats", 2, "--max-kl", 0.001)
    assert len(printed.splitlines()) == 4
    assert "keep - reread  KL" in printed


def test_an_artifact_of_masks_is_refused(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load("chat_turns", monkeypatch)
    monkeypatch.setattr("sys.argv", ["chat_turns.py", str(tiny_artifact)])
    assert script.main() == 2
    assert "has masks and no prices" in capsys.readouterr().err
