"""Impossible options and outputs are refused with exit code 2, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from tda_export.graph import contract
from tests.cli.conftest import FAILURE, USAGE, assert_error, build, listing
from tests.conftest import CALIBRATE_TINY, build_tda, run_cli, run_ok


@pytest.fixture(scope="session")
def half_artifact(tiny_model: Path, tiny_calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny artifact in float16."""
    path = tmp_path_factory.mktemp("artifacts") / "half"
    run_ok(
        *build_tda(tiny_model, tiny_calibration),
        "--dtype",
        "fp16",
        "--no-verify",
        "-o",
        path,
    )
    return path


# Options


@pytest.mark.parametrize("option", ["--cett", "--sparsity"])
@pytest.mark.parametrize("value", ["1.0", "-0.1", "x"])
@pytest.mark.parametrize("command", ["calibrate", "build", "generate"])
def test_budget_out_of_range(command: str, option: str, value: str, outputs: Path, tiny_model: Path) -> None:
    output = [] if command == "generate" else ["-o", outputs / "x"]
    result = run_cli(command, tiny_model, *output, option, value)
    assert_error(result, USAGE, option, value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--cett", "0.2", "--sparsity", "0.2"], "Give exactly one budget: --cett, --sparsity or --max-kl"),
        (["--max-kl", "0.1", "--sparsity", "0.2"], "Give exactly one budget: --cett, --sparsity or --max-kl"),
        (["--max-kl", "-1"], "--max-kl -1.0: give a positive number of nats"),
        (["--max-kl", "nan"], "--max-kl nan: give a positive number of nats"),
        (["--allocation", "uniform"], "--allocation spreads a --sparsity over the layers. Give --sparsity"),
        (["--cett", "0.2", "--allocation", "uniform"], "--allocation spreads a --sparsity over the layers"),
        (["--cett", "nan"], "CETT nan is outside [0, 1)"),
        (["--sparsity", "nan"], "sparsity nan is outside [0, 1)"),
    ],
    ids=[
        "two",
        "KL too",
        "negative KL",
        "nan KL",
        "allocation alone",
        "allocation of CETT",
        "nan CETT",
        "nan sparsity",
    ],
)
@pytest.mark.parametrize("command", ["calibrate", "build", "generate"])
def test_impossible_budget(
    command: str,
    options: list[str],
    text: str,
    outputs: Path,
    tiny_model: Path,
    tiny_artifact: Path,
    tiny_calibration: Path,
) -> None:
    arguments = {
        "calibrate": [tiny_model, "-o", outputs / "x", "--method", "tda"],
        "build": [tiny_model, "-o", outputs / "x", "--method", "tda", "--calibration", tiny_calibration],
        "generate": [tiny_artifact, "Hi"],
    }[command]
    assert_error(run_cli(command, *arguments, *options), USAGE, text)


@pytest.mark.parametrize(
    "budget",
    [["--cett", "0.2"], ["--sparsity", "0"], ["--allocation", "uniform"], ["--max-kl", "0.1"], ["--refresh", "4"]],
    ids=lambda words: " ".join(words),
)
def test_budget_of_dense_decoding(tiny_artifact: Path, budget: list[str]) -> None:
    result = run_cli("generate", tiny_artifact, "Hi", "--mask", "dense", *budget)
    assert_error(result, USAGE, "--mask dense reads every row, so a budget has no effect. Leave one of them out")


def test_griffin_of_an_impossible_sparsity(outputs: Path, tiny_model: Path) -> None:
    result = run_cli("build", tiny_model, "--method", "griffin", "--sparsity", "nan", "-o", outputs / "x")
    assert_error(result, USAGE, "sparsity nan is outside [0, 1)")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--prompt-tokens", "1"], "--prompt-tokens"),
        (["--continuation-tokens", "0"], "--continuation-tokens"),
        (["--sequences", "0"], "--sequences"),
        (["--sequences", "1"], "1 is too few for that. Give --sequences 2 or more and text for them, or --curves-only"),
        (["--sparsity", "0.9"], "Sparsity 0.9 is more than the KL path is measured at (about 0.8). Give a lower"),
        (["--estimator", "guess"], "'guess' is not one of"),
        (["--dtype", "fp16"], "--dtype fp16 on the CPU is slow"),
        (["--device", "tpu"], "--device tpu"),
        (["--device", "cuda:99"], "--device cuda"),
        (["--seed", "-1"], "-1"),
        (["--prior-tokens", "-1"], "--prior-tokens"),
        (["--curves-only", "--sparsity", "0.5"], "--curves-only leaves out what this budget needs. Give --cett"),
        (["--curves-only", "--max-kl", "0.5"], "--curves-only leaves out what this budget needs. Give --cett"),
        (["--prompt-tokens", "500"], "516 tokens (prompt and continuation) are more than the 512 positions"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_calibrate_options(outputs: Path, tiny_model: Path, options: list[str], text: str) -> None:
    result = run_cli("calibrate", tiny_model, "-o", outputs / "x", *CALIBRATE_TINY, *options)
    assert_error(result, USAGE, text)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--temperature", "-1"], "Temperature -1.0 is negative"),
        (["--temperature", "nan"], "Temperature nan"),
        (["--top-k", "-1"], "top-k -1 is negative"),
        (["--top-p", "0"], "top-p 0.0 is outside"),
        (["--seed", "-1", "--temperature", "1"], "-1"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--context", "0"], "A context of 0 tokens is outside [2, 512]"),
        (["--context", "513"], "A context of 513 tokens is outside [2, 512]"),
        (["--mask", "sparse"], "'sparse' is not one of"),
        (["--refresh", "1"], "A refresh after every 1 tokens: give 2 or more, or 0 for none"),
        (["--refresh", "-1"], "--refresh"),
        (["--sparsity", "0.95"], "is more than the calibration measured"),
        (["--provider", "tpu"], "'tpu' is not one of 'auto', 'cpu', 'cuda'"),
        (["--provider", "cuda"], "this one is float32"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_generate_options(tiny_artifact: Path, options: list[str], text: str) -> None:
    assert_error(run_cli("generate", tiny_artifact, "Hi", *options), USAGE, text)


def test_griffin_without_sparsity(outputs: Path, tiny_model: Path) -> None:
    result = run_cli("build", tiny_model, "--method", "griffin", "-o", outputs / "x")
    assert_error(result, USAGE, "--method griffin takes --sparsity")


@pytest.mark.parametrize(
    "option",
    [
        ["--cett", "0.2"],
        ["--tail", "mean"],
        ["--calibration", "x"],
        ["--allocation", "uniform"],
        ["--max-kl", "0.1"],
        ["--refresh", "4"],
    ],
    ids=" ".join,
)
def test_griffin_with_what_is_not_its_own(outputs: Path, tiny_model: Path, option: list[str]) -> None:
    result = run_cli("build", tiny_model, "--method", "griffin", "--sparsity", "0.5", *option, "-o", outputs / "x")
    assert_error(result, USAGE, "--method griffin takes --sparsity, and neither")


@pytest.mark.parametrize("method", ["priced", "tda"])
def test_no_calibration(outputs: Path, tiny_model: Path, method: str) -> None:
    result = run_cli("build", tiny_model, "--method", method, "-o", outputs / "x")
    assert_error(result, USAGE, f"--method {method} needs --calibration FILE", "tda-export calibrate")


@pytest.mark.parametrize("budget", [[], ["--sparsity", "0.3"], ["--max-kl", "0.3"]], ids=" ".join)
def test_tail_of_nothing_by_kl(outputs: Path, tiny_model: Path, tiny_calibration: Path, budget: list[str]) -> None:
    result = build(tiny_model, tiny_calibration, outputs / "x", *budget, "--tail", "zero")
    assert_error(result, USAGE, "--tail zero: a budget by KL is calibrated with the tail mean. Leave --tail out")


def test_build_with_a_refresh_of_every_token(outputs: Path, tiny_model: Path, tiny_calibration: Path) -> None:
    result = build(tiny_model, tiny_calibration, outputs / "x", "--refresh", 1)
    assert_error(result, USAGE, "A refresh after every 1 tokens: give 2 or more")


@pytest.mark.parametrize("budget", [["--sparsity", "0.3"], ["--max-kl", "0.3"]], ids=" ".join)
def test_budget_by_kl_of_curves_alone(outputs: Path, tiny_model: Path, tmp_path: Path, budget: list[str]) -> None:
    run_ok("calibrate", tiny_model, "-o", tmp_path / "c", *CALIBRATE_TINY, "--curves-only")
    result = build(tiny_model, tmp_path / "c", outputs / "x", *budget)
    assert_error(result, USAGE, "This calibration contains only CETT curves. Calibrate without --curves-only")


@pytest.mark.parametrize("budget", [["--sparsity", "0.3"], ["--max-kl", "0.3"]], ids=" ".join)
def test_budget_by_kl_of_an_artifact_without_a_prior(
    tiny_model: Path, tiny_calibration: Path, tmp_path: Path, budget: list[str]
) -> None:
    output = tmp_path / "a"
    assert build(tiny_model, tiny_calibration, output, "--cett", 0.2, "--no-verify").exit_code == 0
    result = run_cli("generate", output, "Hi", *budget)
    assert_error(result, USAGE, "was built without the prior and the tail mean", "--allocation kl")


def test_no_output(tiny_model: Path) -> None:
    assert_error(run_cli("build", tiny_model), USAGE, "'--output'")


def test_verify_against_and_files_only(tiny_artifact: Path, tiny_model: Path) -> None:
    result = run_cli("verify", tiny_artifact, "--files-only", "--against", tiny_model)
    assert_error(result, USAGE, "--files-only compares with no model")


@pytest.mark.parametrize("command", ["build", "verify"])
def test_cuda_for_float32(
    command: str, outputs: Path, tiny_model: Path, tiny_artifact: Path, tiny_calibration: Path
) -> None:
    arguments = {
        "build": [tiny_model, "--method", "tda", "--calibration", tiny_calibration, "-o", outputs / "x"],
        "verify": [tiny_artifact],
    }[command]
    assert_error(run_cli(command, *arguments, "--provider", "cuda"), USAGE, "float32", "--dtype fp16")


@pytest.mark.parametrize("command", ["build", "generate", "verify"])
def test_cuda_where_none_is(
    command: str,
    outputs: Path,
    tiny_model: Path,
    tiny_calibration: Path,
    half_artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tda_export.runtime.providers.cuda_problem", lambda: "no NVIDIA driver is installed here")
    arguments = {
        "build": [
            tiny_model,
            "--method",
            "tda",
            "--calibration",
            tiny_calibration,
            "--dtype",
            "fp16",
            "-o",
            outputs / "x",
        ],
        "generate": [half_artifact, "Hi"],
        "verify": [half_artifact],
    }[command]
    result = run_cli(command, *arguments, "--provider", "cuda")
    assert_error(result, FAILURE, "CUDA cannot be used: no NVIDIA driver is installed here. Use --provider cpu")


# Outputs


def test_calibration_that_exists(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    result = run_cli("calibrate", tiny_model, "-o", tmp_path / "x", *CALIBRATE_TINY)
    assert_error(result, USAGE, "x exists. Choose another output.")
    assert listing(tmp_path) == {"x": b"mine"}


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_calibration_over_a_folder(tiny_model: Path, tmp_path: Path, overwrite: list[str]) -> None:
    (tmp_path / "x").mkdir()
    result = run_cli("calibrate", tiny_model, "-o", tmp_path / "x", *CALIBRATE_TINY, *overwrite)
    assert_error(result, USAGE, "is a directory")


def test_artifact_that_exists(tiny_model: Path, tiny_calibration: Path, artifact_copy: Path) -> None:
    before = listing(artifact_copy.parent)
    assert_error(build(tiny_model, tiny_calibration, artifact_copy), USAGE, "artifact exists", "--overwrite")
    assert listing(artifact_copy.parent) == before


def test_calibration_over_a_models_weights(model_copy: Path) -> None:
    """An easy mistake, since both are .safetensors files."""
    before = listing(model_copy)
    result = run_cli("calibrate", model_copy, "-o", model_copy / "model.safetensors", *CALIBRATE_TINY, "--overwrite")
    assert_error(result, USAGE, "model.safetensors exists and is not a calibration, so it is not replaced")
    assert listing(model_copy) == before


def test_artifact_into_an_empty_folder(tiny_model: Path, tiny_calibration: Path, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    assert_error(build(tiny_model, tiny_calibration, tmp_path / "x"), USAGE, "replace it with --overwrite")
    assert build(tiny_model, tiny_calibration, tmp_path / "x", "--overwrite", "--no-verify").exit_code == 0
    assert (tmp_path / "x" / contract.MANIFEST_FILE).is_file()


@pytest.mark.parametrize("content", [b"", b"mine", bytes(100)], ids=["empty", "text", "zeros"])
def test_calibration_over_a_foreign_file(tiny_model: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    result = run_cli("calibrate", tiny_model, "-o", tmp_path / "x", *CALIBRATE_TINY, "--overwrite")
    assert_error(result, USAGE, "x exists and is not a calibration, so it is not replaced. Choose another output")
    assert listing(tmp_path) == {"x": content}


@pytest.mark.parametrize(
    ("overwrite", "text"), [([], "x exists. Choose"), (["--overwrite"], "x exists and is not an artifact")], ids=str
)
def test_artifact_over_a_file(
    tiny_model: Path, tiny_calibration: Path, tmp_path: Path, overwrite: list[str], text: str
) -> None:
    (tmp_path / "x").write_text("mine")
    assert_error(build(tiny_model, tiny_calibration, tmp_path / "x", *overwrite), USAGE, text)
    assert listing(tmp_path) == {"x": b"mine"}


@pytest.mark.parametrize(
    "files",
    [
        {"thesis.tex": "mine"},
        {contract.MANIFEST_FILE: '{"name": "a browser extension"}', "src/main.js": "mine"},
        {contract.MANIFEST_FILE: '{"files": {}}'},
        {contract.MANIFEST_FILE: "[]"},
        {contract.MANIFEST_FILE: "{"},
    ],
    ids=["no manifest", "another manifest", "no format", "a list", "not JSON"],
)
def test_artifact_over_a_foreign_folder(
    tiny_model: Path, tiny_calibration: Path, tmp_path: Path, files: dict[str, str]
) -> None:
    for name, content in files.items():
        path = tmp_path / "x" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    before = listing(tmp_path)
    result = build(tiny_model, tiny_calibration, tmp_path / "x", "--overwrite")
    assert_error(
        result,
        USAGE,
        "x exists and is not an artifact without other files, so it is not replaced. Choose another output",
    )
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", ["notes.txt", "src/main.js"])
def test_artifact_over_one_that_holds_more(
    tiny_model: Path, tiny_calibration: Path, artifact_copy: Path, name: str
) -> None:
    """A user put a file of their own into the artifact."""
    (artifact_copy / name).parent.mkdir(exist_ok=True)
    (artifact_copy / name).write_text("mine")
    before = listing(artifact_copy.parent)
    result = build(tiny_model, tiny_calibration, artifact_copy, "--overwrite")
    assert_error(result, USAGE, "is not an artifact without other files, so it is not replaced")
    assert listing(artifact_copy.parent) == before


@pytest.mark.parametrize("command", ["calibrate", "build"])
def test_output_in_a_missing_folder(command: str, outputs: Path, tiny_model: Path) -> None:
    result = run_cli(command, tiny_model, "-o", outputs / "a" / "x")
    assert_error(result, USAGE, "does not exist. Create it first")


def test_demo_into_a_file(tmp_path: Path) -> None:
    (tmp_path / "artifacts").touch()
    assert_error(run_cli("demo", "--artifacts", tmp_path / "artifacts"), USAGE, "artifacts")
