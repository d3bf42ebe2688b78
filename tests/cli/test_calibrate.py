"""`tda-export calibrate --method tda` from end to end on the tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tda_export.calibration.budgets import Budget
from tda_export.calibration.file import read_calibration
from tda_export.calibration.kl_table import SHARES
from tda_export.graph import contract
from tests.cli.results import CHECK_NAMES, result_of
from tests.conftest import CALIBRATE_TINY, build_tda, run_cli, run_ok

ONE_LEVEL_CHECKS = [name for name in CHECK_NAMES if name not in ("tail mean", "statistics with the prior")]


def test_calibrate(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "c.safetensors"
    result = run_ok("calibrate", tiny_model, "-o", output, *CALIBRATE_TINY)
    assert "prompt estimator, sparsity 0.5, kl" in result.stdout
    assert "up/down density" in result.stdout
    assert f"Calibrated on 4 sequences; wrote {output}" in result.stdout
    table = read_calibration(output).kl
    assert table is not None
    assert "KL to dense along the path, nats a token" in result.stdout
    for row in table.measurements():
        cells = [
            f"{row['ffn_share']:.3f}",
            f"{row['fitted_kl']:.3f} ± {row['fitted_kl_stderr']:.3f}",
            f"{row['held_out_kl']:.3f} ± {row['held_out_kl_stderr']:.3f}",
            f"{row['single_layers_kl']:.3f}",
        ]
        printed = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines()]
        assert cells in printed, result.stdout
    assert output.is_file()


def test_calibrate_json(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "c.safetensors"
    options = ("--sparsity", "0.4", "--seed", "3", "--prior-tokens", "32")
    result = result_of("calibrate", tiny_model, "-o", output, *CALIBRATE_TINY, *options)
    assert result["output"] == str(output)
    assert result["model"]["name"] == str(tiny_model)
    assert result["model"]["architecture"] == "LlamaForCausalLM"
    assert (result["dataset"]["name"], result["dataset"]["sequences"]) == ("builtin", 4)
    assert result["settings"] == {
        "method": "tda",
        "estimator": "prompt",
        "sequences": 4,
        "prompt_tokens": 32,
        "continuation_tokens": 16,
        "seed": 3,
        "dtype": "fp32",
        "device": "cpu",
        "curves_only": False,
        "prior_tokens": 32,
    }
    assert result["budget"] == {"sparsity": 0.4, "allocation": "kl"}
    allocation = result["allocation"]
    assert len(allocation["thresholds"]) == len(allocation["density"]) == len(allocation["cett"]) == 3
    assert len(allocation["token_thresholds"]) == len(allocation["token_density"]) == 3
    assert allocation["sparsity"] == pytest.approx(0.4, abs=0.01)
    read = sum(allocation["density"]) + 2 * sum(allocation["token_density"])
    assert allocation["sparsity"] == pytest.approx(1 - read / 9)
    assert allocation["kl"] > 0
    assert (allocation["prior_tokens"], allocation["tail_mean"]) == (32.0, True)
    table = read_calibration(output).kl
    assert table is not None
    assert result["predicted_kl"] == table.measurements()
    assert len(result["predicted_kl"]) == len(SHARES)


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        ([], {"cett": 0.2}),
        (["--cett", "0.3"], {"cett": 0.3}),
        (["--sparsity", "0.4", "--allocation", "uniform"], {"sparsity": 0.4, "allocation": "uniform"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_curves_only(tiny_model: Path, tmp_path: Path, options: list[str], budget: dict[str, Any]) -> None:
    """A build from it takes one-level budgets, without prior and tail mean."""
    output = tmp_path / "c.safetensors"
    result = result_of("calibrate", tiny_model, "-o", output, *CALIBRATE_TINY, "--curves-only", *options)
    assert result["settings"]["curves_only"]
    assert result["budget"] == budget
    allocation = result["allocation"]
    assert (allocation["token_thresholds"], allocation["kl"]) == ([], None)
    assert allocation["sparsity"] == pytest.approx(1 - sum(allocation["density"]) / 3)
    assert read_calibration(output).kl is None
    assert result["predicted_kl"] == []
    built = result_of(*build_tda(tiny_model, output), "-o", tmp_path / "a")
    assert [check["name"] for check in built["checks"]] == ONE_LEVEL_CHECKS
    assert built["budget"] == budget
    manifest = json.loads((tmp_path / "a" / contract.MANIFEST_FILE).read_text())
    assert (manifest["method"]["tail"], manifest["prior_tokens"]) == ("zero", 0.0)
    assert (manifest["token_thresholds"], manifest["survivors"]) == ([0.0] * 3, [1.0] * 3)


def test_calibrate_by_max_kl(tiny_model: Path, tmp_path: Path) -> None:
    result = result_of("calibrate", tiny_model, "-o", tmp_path / "c", *CALIBRATE_TINY, "--max-kl", "0.5")
    assert result["budget"] == {"max_kl": 0.5}
    assert 0 < result["allocation"]["kl"] <= 0.5 * (1 + 1e-6)


def test_calibration_is_repeatable(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run_ok("calibrate", tiny_model, "-o", tmp_path / name, *CALIBRATE_TINY)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_calibrate_overwrites_a_calibration(tiny_model: Path, tiny_calibration: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_calibration, tmp_path / "c")
    run_ok("calibrate", tiny_model, "-o", tmp_path / "c", *CALIBRATE_TINY, "--cett", "0.2", "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert (tmp_path / "c").read_bytes() != tiny_calibration.read_bytes()  # another budget


def test_a_sparsity_that_is_just_missed_becomes_the_nearest(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measurements are kept, with a budget that can be met."""
    monkeypatch.setattr("tda_export.calibration.kl_plan.SHARES", (0.7, 0.5, 0.3))
    output = tmp_path / "c.safetensors"
    result = run_ok("calibrate", tiny_model, "-o", output, *CALIBRATE_TINY, "--sparsity", "0.79")
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]
    calibration = read_calibration(output)
    assert calibration.kl is not None
    most = calibration.kl.most_sparsity
    assert 0.6 < most < 0.79
    assert calibration.provenance["budget"] == {"sparsity": most, "allocation": "kl"}
    assert f"The KL path reaches sparsity {most}, not 0.79: that is the file's budget.\n" in result.stderr
    assert f"prompt estimator, sparsity {most}, kl" in result.stdout
    assert calibration.allocate(Budget(**calibration.provenance["budget"])).sparsity == pytest.approx(most, abs=1e-3)
    run_ok(*build_tda(tiny_model, output), "-o", tmp_path / "a", "--no-verify")


def test_one_sequence_is_enough_for_curves_alone(tiny_model: Path, tmp_path: Path) -> None:
    options = (*CALIBRATE_TINY, "--sequences", "1")
    result = run_ok("calibrate", tiny_model, "-o", tmp_path / "c", *options, "--curves-only")
    assert "Calibrated on 1 sequences; wrote " in result.stdout
    assert "KL to dense along the path" not in result.stdout


def test_text_for_one_sequence_alone_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "x" * 60}) + "\n")
    result = run_cli(
        "calibrate", tiny_model, "-o", tmp_path / "c", *CALIBRATE_TINY, "--dataset", tmp_path / "rows.jsonl"
    )
    assert result.exit_code == 2
    assert "1 is too few for that. Give --sequences 2 or more and text for them, or --curves-only." in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_less_text_than_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": "x" * 60}) + "\n" for _ in range(2)))
    result = run_ok(
        *("calibrate", tiny_model, "-o", tmp_path / "c", *CALIBRATE_TINY),
        *("--dataset", tmp_path / "rows.jsonl", "--text-column", "body"),
    )
    assert "has text for 2 sequences of 48 tokens; using those" in result.stderr
    assert "Calibrated on 2 sequences; wrote " in result.stdout


def test_names_in_brackets_are_shown_as_they_are(tiny_model: Path, tmp_path: Path) -> None:
    """Rich would take [v2] for markup."""
    model = shutil.copytree(tiny_model, tmp_path / "tiny[v2]")
    result = run_ok("calibrate", model, "-o", tmp_path / "c", *CALIBRATE_TINY)
    assert f"{model}, prompt estimator" in result.stdout
