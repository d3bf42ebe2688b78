"""`tda-export eval --tasks` and `eval-data`: output and errors."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tda_export.evaluation import eval_data
from tests.cli.conftest import FAILURE, USAGE, assert_error
from tests.conftest import run_cli, run_ok
from tests.evaluation.test_run_tasks import write_data


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


def test_json(tiny_artifact: Path, data: Path) -> None:
    result = json.loads(
        run_ok("eval", tiny_artifact, "--tasks", "piqa, gsm8k", "--data", data, "--limit", 2, "--json").stdout
    )
    assert (result["method"], result["protocol"], result["limit"]) == ("tda", "strict", 2)
    assert result["budget"] == {"sparsity": 0.5, "allocation": "kl"}
    assert list(result["tasks"]) == ["piqa", "gsm8k"]
    piqa = result["tasks"]["piqa"]
    assert piqa["questions"] == 2
    assert 0.0 < piqa["ffn_share"] < 1.0
    assert piqa["metrics"]["acc"].keys() == {"value", "stderr"}
    assert "reference" not in result


def test_reference_beside_dense(tiny_artifact: Path, tiny_model: Path, data: Path) -> None:
    options = ["--tasks", "gsm8k", "--data", data, "--method", "dense", "--reference", tiny_model]
    result = json.loads(run_ok("eval", tiny_artifact, *options, "--json").stdout)
    reference = result["reference"]
    assert (reference["dtype"], reference["device"]) == ("float32", "cpu")
    ours, theirs = (part["tasks"]["gsm8k"]["metrics"]["bits_per_byte"]["value"] for part in (result, reference))
    assert ours == pytest.approx(theirs, rel=1e-3)
    printed = run_ok("eval", tiny_artifact, *options).stdout
    assert "dense, strict protocol\ngsm8k" in printed
    assert f"{reference['model']} in transformers\ngsm8k" in printed


def test_protocol_and_budget_reach_the_model(tiny_artifact: Path, data: Path) -> None:
    def bits(*options: object) -> float:
        options = ("eval", tiny_artifact, "--tasks", "gsm8k", "--data", data, "--json", *options)
        value: float = json.loads(run_ok(*options).stdout)["tasks"]["gsm8k"]["metrics"]["bits_per_byte"]["value"]
        return value

    griffin = ("--method", "griffin", "--sparsity", 0.5)
    found = {
        bits(),
        bits("--sparsity", 0.75),
        bits("--max-kl", 2.0),
        bits("--sparsity", 0.5, "--allocation", "uniform"),
        bits("--protocol", "griffin"),
        bits(*griffin),
    }
    assert len(found) == 6


def test_truncation_on_tasks(token_artifact: Path, data: Path) -> None:
    options = ("--tasks", "piqa,gsm8k", "--data", data, "--method", "tt", "--sparsity", 0.2, "--json")
    result = json.loads(run_ok("eval", token_artifact, *options).stdout)
    assert result["method"] == "tt"
    for task in ("piqa", "gsm8k"):
        assert (2 + 0.2) / 3 < result["tasks"][task]["ffn_share"] < (2 + 0.6) / 3


def test_data_from_the_environment(tiny_artifact: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDA_EXPORT_EVAL_DATA", str(data))
    assert "copa" in run_ok("eval", tiny_artifact, "--tasks", "copa").stdout
    text = ("eval", tiny_artifact, "--text", data / "copa.jsonl")  # the variable must not count as an option
    assert_error(run_cli(*text), FAILURE, "The text has")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "Give either --text or --tasks"),
        (["--text", "x", "--tasks", "piqa"], "Give either --text or --tasks"),
        (["--tasks", "piqa", "--prompts", 3], "--prompts has no effect with --tasks"),
        (["--tasks", "piqa", "--refresh", 3], "--refresh has no effect with --tasks"),
        (["--tasks", "piqa", "--free", 3], "--free has no effect with --tasks"),
        (["--text", "x", "--free", 3, "--continuation-tokens", 3], "--continuation-tokens has no effect with --free"),
        (["--text", "x", "--limit", 3], "--limit has no effect with --text"),
        (["--tasks", "piqa"], "--tasks needs --data FOLDER"),
        (["--tasks", "pica", "--data", "x"], "Task 'pica' is not known"),
        (["--tasks", ",", "--data", "x"], "No task is named"),
        (["--tasks", "piqa", "--limit", 1], "--limit"),
    ],
)
def test_options_that_do_not_go_together(
    tiny_artifact: Path, options: list[object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TDA_EXPORT_EVAL_DATA", raising=False)
    assert_error(run_cli("eval", tiny_artifact, *options), USAGE, words)


def test_method_is_checked(tiny_artifact: Path, data: Path) -> None:
    options = ("--tasks", "piqa", "--data", data, "--method", "griffin")
    assert_error(run_cli("eval", tiny_artifact, *options), USAGE, "griffin takes --sparsity")


def test_data_that_are_not_there(tiny_artifact: Path, tmp_path: Path) -> None:
    result = run_cli("eval", tiny_artifact, "--tasks", "piqa", "--data", tmp_path)
    assert_error(result, FAILURE, "piqa.jsonl: no such file", "eval-data")


def test_without_the_harness(tiny_artifact: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    result = run_cli("eval", tiny_artifact, "--tasks", "piqa", "--data", data)
    assert_error(result, USAGE, "Install 'tda-export[eval]'")


def test_eval_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(folder: Path, *, overwrite: bool, notify: Any) -> dict[str, int]:
        notify("Fetching it")
        assert (folder, overwrite) == (tmp_path / "data", True)
        return {"piqa": 1838}

    monkeypatch.setattr(eval_data, "fetch_eval_data", fetch)
    result = run_ok("eval-data", tmp_path / "data", "--overwrite")
    assert (result.stdout, result.stderr) == ("piqa              1838 rows\n", "Fetching it\n")


def test_eval_data_exists(tmp_path: Path) -> None:
    assert_error(run_cli("eval-data", tmp_path), USAGE, "exists", "--overwrite")
