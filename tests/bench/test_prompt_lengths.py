"""`benchmarks/prompt_lengths.py` with the tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tda_export.bench.priced import PricedRunner
from tda_export.runtime import providers
from tests.bench.test_scripts import load


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["prompt_lengths.py", *map(str, arguments)])
    monkeypatch.setattr(providers, "ATTENTION_KERNELS", providers.ATTENTION_KERNELS)  # restored afterwards
    load("prompt_lengths", monkeypatch).main()


def test_every_length_is_read_twice(
    priced_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths, prefill = [], PricedRunner.prefill

    def noted(self: PricedRunner, prompt: list[int]) -> None:
        lengths.append(len(prompt))
        prefill(self, prompt)

    monkeypatch.setattr(PricedRunner, "prefill", noted)
    run(monkeypatch, priced_artifact, "--prompts", 4, "--shortest", 5, "--longest", 9, "--provider", "cpu")
    found = json.loads(capsys.readouterr().out)
    assert lengths[0] == 9
    assert sorted(lengths[1:5]) == [5, 6, 7, 8]
    assert lengths[1:5] == lengths[5:]
    assert found["first_ms"] > 0 < found["again_ms"]
    assert len(found["grown_mb"]) == 2


def test_the_choice_of_kernels(
    priced_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --any-attention sessions open with ONNX Runtime's own choice, for which there is no GPU here."""
    with pytest.raises(SystemExit):
        run(monkeypatch, priced_artifact, "--prompts", 1, "--any-attention", "--provider", "cpu")
    assert providers.ATTENTION_KERNELS == 0
    assert providers.provider_arguments("cuda")[0][1]["sdpa_kernel"] == "0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompts", 4, "--shortest", 5, "--longest", 8), "There are 3 lengths. Give fewer --prompts, or --shortest"),
        (("--prompts", 0), "Give --prompts and --shortest of 1 or more."),
        (("--shortest", 0), "Give --prompts and --shortest of 1 or more."),
        (
            ("--provider", "cpu", "--any-attention"),
            "--any-attention chooses kernels of CUDA, and this runs on the CPU.",
        ),
    ],
)
def test_refusals(
    priced_artifact: Path,
    arguments: tuple[object, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, priced_artifact, *arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"prompt_lengths.py: error: {message}")


def test_an_artifact_without_prices(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, tiny_artifact, "--provider", "cpu")
    assert stopped.value.code == 2
    message = f"{tiny_artifact}: its layout is indexed. Give an artifact with prices."
    assert capsys.readouterr().err.splitlines()[-1] == f"prompt_lengths.py: error: {message}"
