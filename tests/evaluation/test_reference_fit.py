"""All baselines fitted in one pass, and the benchmark script that measures them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tda_export.errors import UsageError
from tda_export.evaluation.predictor import PredictorMethod, PredictorSettings, predictor_density, train_predictor
from tda_export.evaluation.reference_data import ffn_inputs, layer_activations
from tda_export.evaluation.reference_fit import Wanted, check_wanted, fit_methods
from tda_export.evaluation.reference_methods import CatsMethod, StaticMethod, cats_threshold, sparse_ffn
from tda_export.models.source import ModelSource
from tests.conftest import run_ok

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "baselines.py"
SETTINGS = PredictorSettings(rank=4, epochs=2, batch_tokens=16)
WANTED = [Wanted("dejavu", 0.5), Wanted("static", 0.25), Wanted("cats", 0.4), Wanted("dejavu", 0.3)]
SMALL = ("--prompts", "2", "--prompt-tokens", "16", "--continuation-tokens", "4", "--sequences", "2", "--rank", "4")


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(3, 200, (3, 24), generator=torch.Generator().manual_seed(0))


def test_each_method_is_fitted_to_its_layer_and_sparsity(
    reference: Any, source: ModelSource, tokens: torch.Tensor
) -> None:
    inputs, done = ffn_inputs(reference, source.spec, tokens), []
    methods = fit_methods(reference, source.spec, inputs, WANTED, SETTINGS, done.append)
    assert (list(methods), done) == (WANTED, [1, 1, 1])
    predicted, static, cats, _ = methods.values()
    assert isinstance(predicted, PredictorMethod)
    assert isinstance(static, StaticMethod)
    assert isinstance(cats, CatsMethod)
    density = predictor_density(source.spec, 0.5, 4)
    assert predicted.kept == round(density * 96)
    for layer, x in enumerate(inputs):
        activations = layer_activations(reference, source.spec, layer, x)
        assert cats.thresholds[layer] == cats_threshold(activations.activated, 0.4)
        assert int(static.masks[layer].sum()) == 72
        trained = train_predictor(x, activations.relative, density, SETTINGS)
        assert torch.equal(predicted.predictors[layer].second, trained.second)
    dense_bytes = 3 * 3 * 96 * 64 * 4
    for one, method in methods.items():
        with torch.inference_mode(), sparse_ffn(reference, source.spec, method) as count:
            for sequence in tokens:
                reference(sequence[None, 1:])
        unread = 1 - count.ffn_share - method.extra_bytes / dense_bytes
        assert unread == pytest.approx(one.sparsity, abs=0.05)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (Wanted("static", 1.0), r"Sparsity 1.0 is outside \[0, 1\)"),
        (Wanted("static", -0.1), r"outside \[0, 1\)"),
        (Wanted("cats", 0.7), "saves at most 2/3"),
        (Wanted("dejavu", 0.99), "Predictors of rank 4"),
    ],
)
def test_what_a_method_cannot_save_is_refused(wanted: Wanted, words: str, source: ModelSource) -> None:
    with pytest.raises(UsageError, match=words):
        check_wanted(wanted, source.spec, SETTINGS)
    with pytest.raises(UsageError, match=words):
        fit_methods(None, source.spec, [], [wanted], SETTINGS)


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("baselines", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "harbour.txt"
    path.write_text("The boats come home at dusk, and the gulls come with them. " * 20, encoding="utf-8")
    return path


def run_script(script: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["baselines.py", *map(str, arguments)])
    return script.main()


def test_script_has_the_keys_and_the_dense_model_of_eval(
    script: Any,
    tiny_model: Path,
    tiny_artifact: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_script(script, monkeypatch, text, "--model", tiny_model, "--sparsity", 0.5, 0.7, "--json", *SMALL) == 0
    printed = capsys.readouterr()
    results = [json.loads(line) for line in printed.out.splitlines()]
    assert [(result["method"], result["budget"]["sparsity"]) for result in results] == [
        ("static", 0.5),
        ("static", 0.7),
        ("cats", 0.5),
        ("dejavu", 0.5),
        ("dejavu", 0.7),
        ("moe-true", 0.5),
        ("moe-true", 0.7),
        ("moe", 0.5),
        ("moe", 0.7),
    ]
    assert "cats at sparsity 0.7 is left out: CATS reads every gate row" in printed.err
    windows = SMALL[:6]
    evaluated = json.loads(run_ok("eval", tiny_artifact, "--text", text, "--json", *windows).stdout)
    for result in results:
        assert result.keys() == evaluated.keys() | {"predictor_bytes"}
        assert result["dense_perplexity"] == pytest.approx(evaluated["dense_perplexity"], rel=1e-4)
        assert (result["predictor_bytes"] > 0) == (result["method"] in ("dejavu", "moe"))
        assert 1 - result["ffn_bytes"] / result["dense_ffn_bytes"] == pytest.approx(
            result["budget"]["sparsity"], abs=0.2 if result["method"].startswith("moe") else 0.1
        )


def test_script_prints_a_table(
    script: Any, tiny_model: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--model", tiny_model, "--methods", "static", "--sparsity", 0.5, *SMALL)
    assert run_script(script, monkeypatch, text, *options) == 0
    dense, header, row = capsys.readouterr().out.splitlines()
    assert dense.startswith("dense perplexity ")
    assert header.split()[:2] == ["method", "sparsity"]
    assert row.split()[:5] == ["static", "0.500", "0.500", "0.000", "0.500"]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ((*SMALL, "--methods", "cats", "--sparsity", 0.9), 2, "Nothing is left to measure"),
        (("--prompts", 1), 2, "Give 2 prompts or more"),
        (("--prompts", 1000), 1, "of 1000 windows"),
        (("--model", "/nowhere"), 1, "no such folder"),
    ],
)
def test_script_errors_are_one_line(
    script: Any,
    tiny_model: Path,
    text: Path,
    options: tuple[object, ...],
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_script(script, monkeypatch, text, "--model", tiny_model, *options) == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("Error: ")
    assert words in last


def test_script_needs_a_text(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(script, monkeypatch, tmp_path / "nowhere.txt") == 2
    assert "nowhere.txt: no such file" in capsys.readouterr().err
    (tmp_path / "cafe.txt").write_bytes(b"caf\xe9")
    assert run_script(script, monkeypatch, tmp_path / "cafe.txt") == 1
    assert "not valid UTF-8" in capsys.readouterr().err
