"""`benchmarks/prompt_lengths.py` with the tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tda_export.runtime import providers
from tests.bench.test_scripts import load


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["prompt_lengths.py", *map(str, arguments)])
    monkeypatch.setattr(providers, "ATTENTION_KERNELS", providers.ATTENTION_KERNELS)  # restored afterwards
    load("prompt_lengths", monkeypatch).main()


def test_every_length_is_read_twice(
    priced_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, priced_artifact, "--prompts", 4, "--shortest", 5, "--longest", 9, "--provider", "cpu")
    found = json.loads(capsys.readouterr().out)
    assert found["prompts"] == 4
    assert not found["any_attention"]
    assert found["first_ms"] > 0 < found["again_ms"]
    assert len(found["grown_mb"]) == 2
    assert providers.ATTENTION_KERNELS


def test_onnx_runtime_chooses(
    priced_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, priced_artifact, "--prompts", 1, "--shortest", 5, "--longest", 5, "--any-attention")
    assert json.loads(capsys.readouterr().out)["any_attention"]
    assert providers.ATTENTION_KERNELS == 0


def test_refusals(
    priced_artifact: Path,
    tiny_artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for artifact, longest, message in (
        (priced_artifact, 7, "There are 3 lengths. Give fewer --prompts, or --shortest and --longest apart."),
        (tiny_artifact, 9, f"{tiny_artifact}: its layout is indexed. Give an artifact with prices."),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(monkeypatch, artifact, "--prompts", 4, "--shortest", 5, "--longest", longest)
        assert stopped.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"prompt_lengths.py: error: {message}"
