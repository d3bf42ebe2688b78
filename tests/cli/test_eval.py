"""`tda-export eval`: output and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tda_export.graph import contract
from tests.cli.conftest import FAILURE, USAGE, assert_error
from tests.conftest import CALIBRATE_TINY, run_cli, run_ok
from tests.runtime.conftest import edit_manifest

SMALL = ("--prompts", 2, "--prompt-tokens", 16, "--continuation-tokens", 4)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "harbour.txt"
    path.write_text("The boats come home at dusk, and the gulls come with them. " * 20, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("options", "method", "budget", "density"),
    [
        ([], "tda", {"sparsity": 0.5, "allocation": "kl"}, None),
        (["--sparsity", 0.5, "--allocation", "uniform"], "tda", {"sparsity": 0.5, "allocation": "uniform"}, None),
        (["--max-kl", 0.05], "tda", {"max_kl": 0.05}, None),
        (["--cett", 0], "tda", {"cett": 0.0}, 1.0),
        (["--method", "griffin", "--sparsity", 0.75], "griffin", {"sparsity": 0.75}, 0.25),
        (["--method", "dense"], "dense", {}, 1.0),
    ],
)
def test_json(
    tiny_artifact: Path, text: Path, options: list[object], method: str, budget: dict[str, float], density: float | None
) -> None:
    result = json.loads(run_ok("eval", tiny_artifact, "--text", text, "--json", *SMALL, *options).stdout)
    assert (result["method"], result["budget"], result["prompts"]) == (method, budget, 2)
    if density is None:
        assert 0.0 < result["density"] < 1.0
    else:
        assert result["density"] == pytest.approx(density, abs=0.01)
    share = result["ffn_bytes"] / result["dense_ffn_bytes"]
    if budget.get("allocation") == "kl" or "max_kl" in budget:
        assert result["density"] / 3 < share < result["density"]
    else:
        assert share == pytest.approx(result["density"])
    assert result["refresh_ffn_bytes"] == 0.0
    if result["density"] == 1.0:
        assert result["perplexity"] == pytest.approx(result["dense_perplexity"], rel=1e-4)
    else:
        assert result["kl"] > 0.0
    assert {"kl_stderr", "agreement"} <= result.keys()


def test_summary_names_text_method_and_budget(tiny_artifact: Path, text: Path) -> None:
    printed = run_ok("eval", tiny_artifact, "--text", text, "--sparsity", 0.25, *SMALL).stdout
    assert "tda (sparsity 0.25, allocation kl) on harbour.txt, 2 prompts of 16 + 4 tokens" in printed
    for line in ("KL to dense", "perplexity", "dense perplexity", "top-1 agreement", "FFN bytes a token"):
        assert f"\n{line}" in printed


def test_refreshes_are_told_apart(tiny_artifact: Path, text: Path) -> None:
    def measured(*options: object) -> Any:
        return json.loads(run_ok("eval", tiny_artifact, "--text", text, *SMALL, *options, "--json").stdout)

    plain, refreshed = measured(), measured("--refresh", 2)
    assert refreshed["budget"] == {**plain["budget"], "refresh": 2}
    assert refreshed["kl"] < plain["kl"]  # of four tokens, two are dense
    sparse = refreshed["ffn_bytes"] - refreshed["refresh_ffn_bytes"]
    assert refreshed["refresh_ffn_bytes"] == pytest.approx((refreshed["dense_ffn_bytes"] - sparse) / 2)
    printed = run_ok("eval", tiny_artifact, "--text", text, *SMALL, "--refresh", 2).stdout
    assert "MiB (density 0." in printed
    assert "of them because of refreshes" in printed
    assert "of them because of refreshes" not in run_ok("eval", tiny_artifact, "--text", text, *SMALL).stdout


@pytest.mark.parametrize("beside", [True, False], ids=["file", "own"])
def test_paper(tiny_artifact: Path, token_artifact: Path, text: Path, beside: bool) -> None:
    """One level, by the CETT of tokens: only the mask saves bytes."""
    given = ("--calibration", token_artifact / contract.CALIBRATION_FILE) if beside else ()
    artifact = tiny_artifact if beside else token_artifact
    for options, cett in (((), 0.2), (("--cett", 0.4), 0.4)):
        printed = run_ok("eval", artifact, "--text", text, "--method", "paper", *given, *options, *SMALL, "--json")
        result = json.loads(printed.stdout)
        assert (result["method"], result["budget"]) == ("paper", {"cett": cett})
        assert result["ffn_bytes"] == pytest.approx(result["density"] * result["dense_ffn_bytes"])
        assert result["density"] < 1.0


def test_budget_from_another_calibration(tiny_artifact: Path, token_artifact: Path, text: Path) -> None:
    def measured(*options: object) -> Any:
        return json.loads(run_ok("eval", tiny_artifact, "--text", text, *SMALL, *options, "--json").stdout)

    cett = ("--cett", 0.3)
    other = measured(*cett, "--calibration", token_artifact / contract.CALIBRATION_FILE)
    assert other["density"] != measured(*cett)["density"]


def test_calibration_of_another_model(tiny_artifact: Path, other_model: Path, text: Path, tmp_path: Path) -> None:
    run_ok("calibrate", other_model, "-o", tmp_path / "c", *CALIBRATE_TINY, "--curves-only")
    options = ("--text", text, *SMALL, "--cett", 0.2, "--calibration", tmp_path / "c")
    assert_error(run_cli("eval", tiny_artifact, *options), USAGE, "was calibrated on another model", "--calibration")


def test_missing_text(tiny_artifact: Path, tmp_path: Path) -> None:
    result = run_cli("eval", tiny_artifact, "--text", tmp_path / "nowhere.txt")
    assert_error(result, USAGE, "nowhere.txt: no such file", "--text")


def test_text_that_is_not_utf8(tiny_artifact: Path, text: Path) -> None:
    text.write_bytes(b"caf\xe9 " * 500)
    assert_error(run_cli("eval", tiny_artifact, "--text", text), FAILURE, "not valid UTF-8", "Convert")


def test_text_too_short(tiny_artifact: Path, text: Path) -> None:
    result = run_cli("eval", tiny_artifact, "--text", text, "--prompts", 1000, *SMALL[2:])
    assert_error(result, FAILURE, "of 1000 windows of 21", "--prompts")


def test_lengths_that_do_not_fit_the_model(tiny_artifact: Path, text: Path) -> None:
    text.write_text(text.read_text() * 20)
    result = run_cli("eval", tiny_artifact, "--text", text, "--prompts", 2, "--prompt-tokens", 600)
    assert_error(result, FAILURE, "more than the model's", "Shorten")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "tt"], "tt needs a budget"),
        (["--method", "tt", "--sparsity", 0.2], "calibrate --method tda --estimator token"),
        (["--method", "griffin"], "griffin takes --sparsity"),
        (["--method", "griffin", "--cett", 0.2], "griffin takes --sparsity"),
        (["--method", "griffin", "--sparsity", 0.5, "--allocation", "uniform"], "griffin takes --sparsity"),
        (["--method", "dense", "--sparsity", 0.5], "dense reads every neuron"),
        (["--allocation", "uniform"], "Give --sparsity"),
        (["--cett", 0.2, "--sparsity", 0.5], "Give exactly one budget"),
        (["--prompts", 1], "--prompts"),
        (["--max-kl", 0.1, "--sparsity", 0.5], "Give exactly one budget"),
        (["--max-kl", 0], "--max-kl 0.0: give a positive number"),
        (["--refresh", 1], "A refresh after every 1 tokens: give 2 or more"),
        (["--refresh", -1], "--refresh"),
        (["--calibration", "x"], "--calibration has no effect without a budget"),
        (["--method", "paper"], "paper takes thresholds of single tokens"),
        (["--method", "paper", "--sparsity", 0.5], "paper takes --cett (0.2 unless given)"),
        (["--method", "dense", "--refresh", 4], "dense reads every neuron"),
        (["--method", "griffin", "--sparsity", 0.5, "--refresh", 4], "griffin takes --sparsity"),
        (["--method", "tt", "--cett", 0.2, "--refresh", 4], "tt takes --cett or --sparsity, and nothing else"),
    ],
)
def test_options_that_do_not_go_together(tiny_artifact: Path, text: Path, options: list[object], words: str) -> None:
    result = run_cli("eval", tiny_artifact, "--text", text, *options)
    assert_error(result, USAGE, words)


def test_tda_of_an_artifact_that_selects_by_rank(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "griffin"
    run_ok("build", tiny_model, "--method", "griffin", "--sparsity", 0.5, "--no-verify", "-o", artifact)
    assert_error(run_cli("eval", artifact, "--text", text, "--method", "tda"), USAGE, "built with --method griffin")
    assert_error(run_cli("eval", artifact, "--text", text), USAGE, "--method griffin takes --sparsity")
    printed = run_ok("eval", artifact, "--text", text, "--method", "griffin", "--sparsity", 0.5, "--json", *SMALL)
    assert json.loads(printed.stdout)["density"] == pytest.approx(0.5, abs=0.01)


def test_budget_without_calibration(artifact_copy: Path, text: Path) -> None:
    edit_manifest(artifact_copy, lambda manifest: manifest["files"].pop(contract.CALIBRATION_FILE))
    result = run_cli("eval", artifact_copy, "--text", text, "--sparsity", 0.5, *SMALL)
    assert_error(result, USAGE, "contains no calibration")


@pytest.mark.parametrize("budget", [("--sparsity", 0.2), ("--cett", 0.3)])
def test_truncation_reads_every_gate_and_up_row(token_artifact: Path, text: Path, budget: tuple[str, float]) -> None:
    result = json.loads(
        run_ok("eval", token_artifact, "--text", text, "--method", "tt", "--json", *SMALL, *budget).stdout
    )
    assert (result["method"], 0.0 < result["density"] < 1.0) == ("tt", True)
    assert result["budget"][budget[0][2:]] == budget[1]
    assert result["ffn_bytes"] == pytest.approx((2 + result["density"]) / 3 * result["dense_ffn_bytes"])
    assert result["kl"] > 0.0
    if budget[0] == "--sparsity":
        assert result["density"] == pytest.approx(0.4, abs=0.1)


def test_truncation_beyond_a_third(token_artifact: Path, text: Path) -> None:
    result = run_cli("eval", token_artifact, "--text", text, "--method", "tt", "--sparsity", 0.4)
    assert_error(result, USAGE, "saves at most 1/3", "Give --sparsity up to 0.333")


def test_truncation_without_calibration(artifact_copy: Path, text: Path) -> None:
    edit_manifest(artifact_copy, lambda manifest: manifest["files"].pop(contract.CALIBRATION_FILE))
    result = run_cli("eval", artifact_copy, "--text", text, "--method", "tt", "--cett", 0.2)
    assert_error(result, USAGE, "contains no calibration", "--calibration")


def test_free_generation(tiny_artifact: Path, text: Path) -> None:
    options = ("--text", text, "--prompts", 2, "--prompt-tokens", 16, "--free", 70, "--sparsity", 0.6, "--refresh", 8)
    result = json.loads(run_ok("eval", tiny_artifact, *options, "--json").stdout)
    assert (result["prompts"], result["prompt_tokens"], result["new_tokens"]) == (2, 16, 70)
    assert 0 <= result["divergence"] <= 70
    assert len(result["kl"]) == len(result["kl_stderr"]) == 2
    assert 0.0 < result["refresh_ffn_bytes"] < result["ffn_bytes"] < result["dense_ffn_bytes"]
    printed = run_ok("eval", tiny_artifact, *options).stdout
    assert "2 prompts of 16 + 70 tokens" in printed
    assert f"same text as dense  {result['divergence']:.1f} ±" in printed
    assert f"  tokens   65 to   69  {result['kl'][1]:.4f} ±" in printed
    assert "of them because of refreshes" in printed


def test_parts_of_an_artifact_of_masks(tiny_artifact: Path, text: Path) -> None:
    result = run_cli("eval", tiny_artifact, "--text", text, "--parts", "ffn")
    assert_error(result, USAGE, "--parts has no effect with --method tda", "Leave it out")


def test_bytes_of_all_linears_are_printed(tiny_artifact: Path, text: Path) -> None:
    """Methods with masks read all rows of attention."""
    printed = run_ok("eval", tiny_artifact, "--text", text, "--method", "griffin", "--sparsity", 0.5, *SMALL).stdout
    assert "of layers' linears  0.700: 0.2 of 0.4 MiB, attention's 1.000" in printed
