"""The commands, one after another, on families whose FFNs and norms differ from Llama's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tda_export.calibration.file import read_calibration
from tda_export.models.source import resolve_model
from tda_export.runtime import load
from tda_export.runtime.artifact import open_artifact
from tests.conftest import CALIBRATE_TINY, PRICE_TINY, QUANTIZE_TINY, build_tda, run_ok
from tests.tiny import save_tiny_model

PROMPT = "The keeper of the light wrote down the height of every tide"
UNGATED = ("opt", "gpt-neox", "gpt2")


@pytest.fixture(scope="module", params=["opt", "opt-post-norm", "gemma", "gpt2", "gpt-neox", "phi3"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A family's name, and the folder with its model, calibration and verified artifact."""
    folder = tmp_path_factory.mktemp(request.param)
    model = save_tiny_model(request.param, folder / "model")
    run_ok("calibrate", model, "-o", folder / "calibration", "--sparsity", "0.5", *CALIBRATE_TINY)
    result = run_ok(*build_tda(model, folder / "calibration"), "-o", folder / "artifact", "--json")
    (folder / "built.json").write_text(result.stdout)
    return request.param, folder


def test_build_verifies(built: tuple[str, Path]) -> None:
    _, folder = built
    checks = json.loads((folder / "built.json").read_text())["checks"]
    assert len(checks) == 17  # including that of the prior, which budgets by KL have
    assert all(check["passed"] for check in checks)
    assert run_ok("verify", folder / "artifact").stdout.count(" ok ") == 17


def test_greedy_text_is_that_of_transformers(built: tuple[str, Path]) -> None:
    _, folder = built
    model = load(folder / "artifact")
    tokens = model.text.encode(PROMPT)
    ours = [token.id for token in model.generate(tokens, mask="dense", max_new_tokens=24)]
    reference = resolve_model(str(folder / "model")).reference()
    theirs = reference.generate(torch.tensor([tokens]), max_new_tokens=24, do_sample=False)[0, len(tokens) :]
    assert ours == theirs.tolist()[: len(ours)]
    assert len(ours) == len([token for token in theirs.tolist() if token != 2])


def test_bytes_are_those_of_the_matrices_that_there_are(built: tuple[str, Path]) -> None:
    family, folder = built
    matrices = 2 if family.startswith(UNGATED) else 3
    assert read_calibration(folder / "calibration").ffn_matrices == matrices
    metrics = json.loads(run_ok("generate", folder / "artifact", PROMPT, "--max-new-tokens", 8, "--json").stdout)
    assert metrics["metrics"]["dense_bytes_per_token"] == 3 * 96 * matrices * 64 * 4
    assert 0.2 < metrics["metrics"]["sparsity"] < 0.8


def test_eval_and_report(built: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = built
    text = tmp_path / "text.txt"
    text.write_text("A tide table is a list of heights and hours. " * 12)
    windows = ("--prompt-tokens", 48, "--continuation-tokens", 16, "--prompts", 2, "--json")
    for method in (("tda",), ("griffin", "--sparsity", 0.5)):
        result = run_ok("eval", folder / "artifact", "--text", text, "--method", *method, *windows)
        quality = json.loads(result.stdout)
        assert 0 < quality["ffn_bytes"] < quality["dense_ffn_bytes"]
        assert quality["kl"] > 0
    run_ok("report", folder / "artifact", "-o", tmp_path / "report.html")


def test_bench(built: tuple[str, Path]) -> None:
    """bench compares the logits of all methods before it times them."""
    _, folder = built
    methods = ("--method", "dense", "--method", "dense_native", "--method", "two_levels", "--method", "griffin")
    lengths = ("--prompt-tokens", 32, "--new-tokens", 32)
    result = json.loads(run_ok("bench", folder / "artifact", *methods, *lengths, "--json").stdout)
    assert result["two_levels"]["sparsity"] == pytest.approx(0.5, abs=0.2)


def test_quantised(built: tuple[str, Path]) -> None:
    """From the float model to an artifact of its integers, which build compares with transformers."""
    _, folder = built
    run_ok("quantize", folder / "model", "-o", folder / "quantised", *QUANTIZE_TINY)
    run_ok("calibrate", folder / "quantised", "-o", folder / "prices", "--labels", "1", *PRICE_TINY)
    run_ok("build", folder / "quantised", "--calibration", folder / "prices", "-o", folder / "integers")
    assert open_artifact(folder / "integers").has_integers
    run_ok("generate", folder / "integers", PROMPT, "--max-new-tokens", 8)
