"""Bad input is one clear line with the right exit code, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from tda_export.graph import contract
from tests.cli.conftest import FAILURE, USAGE, assert_error
from tests.conftest import CALIBRATE_TINY, QUANTIZE_TINY, build_tda, run_cli, run_ok
from tests.graph.test_verify import rehash
from tests.runtime.conftest import add_token, edit_manifest


def edit_config(model: Path, **values: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# Models


@pytest.mark.parametrize("command", ["calibrate", "build", "quantize"])
def test_folder_that_is_no_model(command: str, outputs: Path, tmp_path: Path, tiny_calibration: Path) -> None:
    (tmp_path / "empty").mkdir()
    options = ["--method", "tda", "--calibration", tiny_calibration] if command == "build" else []
    result = run_cli(command, tmp_path / "empty", "-o", outputs / "x", *options)
    assert_error(result, FAILURE, "there is no config.json", "smollm2-135m")


def test_missing_model(outputs: Path, tmp_path: Path) -> None:
    result = run_cli("calibrate", tmp_path / "nowhere", "-o", outputs / "x")
    assert_error(result, FAILURE, "nowhere: no such folder", "hub id")


def test_unsupported_architecture(outputs: Path, model_copy: Path) -> None:
    edit_config(model_copy, architectures=["MambaForCausalLM"])
    result = run_cli("calibrate", model_copy, "-o", outputs / "x", *CALIBRATE_TINY)
    assert_error(
        result, FAILURE, "MambaForCausalLM: a recurrent or state-space layer is not supported", "LlamaForCausalLM"
    )


def test_unsupported_activation(outputs: Path, model_copy: Path, tiny_calibration: Path) -> None:
    edit_config(model_copy, hidden_act="tanh")
    result = run_cli(*build_tda(model_copy, tiny_calibration), "-o", outputs / "x")
    assert_error(result, FAILURE, "LlamaForCausalLM with activation 'tanh' is not supported", "silu")


def test_unknown_model_type(outputs: Path, model_copy: Path) -> None:
    edit_config(model_copy, model_type="nonesuch")
    result = run_cli("calibrate", model_copy, "-o", outputs / "x", *CALIBRATE_TINY)
    assert_error(result, FAILURE, "cannot be loaded", "nonesuch")


def test_damaged_config(outputs: Path, model_copy: Path) -> None:
    (model_copy / "config.json").write_text("{")
    assert_error(run_cli("calibrate", model_copy, "-o", outputs / "x", *CALIBRATE_TINY), FAILURE, "cannot be loaded")


def test_truncated_checkpoint(outputs: Path, model_copy: Path) -> None:
    path = model_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    result = run_cli("calibrate", model_copy, "-o", outputs / "x", *CALIBRATE_TINY)
    assert_error(result, FAILURE, "safetensors weights cannot be read", "Download the weights again")


# Datasets


def calibrate_on(model: Path, output: Path, dataset: object, *options: object) -> Result:
    return run_cli("calibrate", model, "-o", output / "x.safetensors", "--dataset", dataset, *CALIBRATE_TINY, *options)


@pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl", "missing.csv", "missing.parquet"])
def test_missing_dataset(outputs: Path, tiny_model: Path, tmp_path: Path, name: str) -> None:
    assert_error(calibrate_on(tiny_model, outputs, tmp_path / name), USAGE, f"{name}: no such file")
    result = run_cli("quantize", tiny_model, "-o", outputs / "x", *QUANTIZE_TINY, "--dataset", tmp_path / name)
    assert_error(result, USAGE, f"{name}: no such file")


def test_dataset_of_unknown_kind(outputs: Path, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus.docx").touch()
    result = calibrate_on(tiny_model, outputs, tmp_path / "corpus.docx")
    assert_error(result, USAGE, "corpus.docx: not a .txt, .jsonl, .csv or .parquet file")


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.csv", "empty.parquet"])
def test_empty_dataset(outputs: Path, tiny_model: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert_error(calibrate_on(tiny_model, outputs, tmp_path / name), FAILURE, f"{name}: the dataset ")


def test_dataset_of_blanks(outputs: Path, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_text('{"text": "  "}\n{"text": null}\n')
    result = calibrate_on(tiny_model, outputs, tmp_path / "blank.jsonl")
    assert_error(result, FAILURE, "blank.jsonl: the dataset is empty. Give one that contains text.")


def test_dataset_too_short(outputs: Path, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("x" * 47)
    result = calibrate_on(tiny_model, outputs, tmp_path / "short.txt")
    assert_error(result, FAILURE, "47 tokens of text, but one sequence takes 48")


def test_damaged_dataset(outputs: Path, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "damaged.jsonl").write_text('{"text": "a"}\n{"text": \n')
    assert_error(calibrate_on(tiny_model, outputs, tmp_path / "damaged.jsonl"), FAILURE, "the dataset cannot be read")


@pytest.mark.parametrize(("column", "options"), [("text", []), ("body", ["--text-column", "body"])])
def test_missing_text_column(outputs: Path, tiny_model: Path, tmp_path: Path, column: str, options: list[str]) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": 1, "content": "x" * 400}) + "\n")
    result = calibrate_on(tiny_model, outputs, tmp_path / "rows.jsonl", *options)
    assert_error(result, USAGE, f"no column '{column}'; the columns are id, content", "--text-column")


def test_text_column_of_a_text_file(outputs: Path, tiny_model: Path) -> None:
    result = calibrate_on(tiny_model, outputs, "builtin", "--text-column", "body")
    assert_error(result, USAGE, "a text file has no columns")


# Calibrations


def test_calibration_of_another_model(outputs: Path, other_model: Path, tiny_calibration: Path) -> None:
    result = run_cli(*build_tda(other_model, tiny_calibration), "-o", outputs / "x")
    assert_error(result, FAILURE, "was calibrated on another model", "tda-export calibrate")


def test_missing_calibration(outputs: Path, tiny_model: Path, tmp_path: Path) -> None:
    result = run_cli(*build_tda(tiny_model, tmp_path / "none"), "-o", outputs / "x")
    assert_error(result, FAILURE, "none: no such calibration file")


def test_file_that_is_no_calibration(outputs: Path, tiny_model: Path) -> None:
    result = run_cli(*build_tda(tiny_model, tiny_model / "model.safetensors"), "-o", outputs / "x")
    assert_error(result, FAILURE, "not a calibration")


def test_truncated_calibration(outputs: Path, tiny_model: Path, tiny_calibration: Path, tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(tiny_calibration.read_bytes()[:1000])
    result = run_cli(*build_tda(tiny_model, tmp_path / "c"), "-o", outputs / "x")
    assert_error(result, FAILURE, "not a readable calibration")


# Artifacts


@pytest.fixture(scope="session")
def griffin_artifact(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of the tiny model with top-k selection."""
    path = tmp_path_factory.mktemp("artifacts") / "griffin"
    run_ok("build", tiny_model, "--method", "griffin", "--sparsity", "0.5", "--no-verify", "-o", path)
    return path


@pytest.mark.parametrize("command", [["generate"], ["verify", "--files-only"]], ids=["generate", "verify"])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda manifest: manifest.update(format_version=99), "format 99 is newer than this tda-export"),
        (lambda manifest: manifest["files"].update({"../x": {"size": 1}}), "names '../x', which is not a file of"),
        (lambda manifest: manifest.pop("format_version"), "no format version"),
        (lambda manifest: manifest.pop("model"), "incomplete manifest"),
        (lambda manifest: manifest["shape"].update(num_layers="3"), "incomplete manifest (shape.num_layers)"),
        (lambda manifest: manifest["files"]["weights.bin"].update(size=1), "truncated or altered"),
    ],
    ids=["newer format", "outside", "no format version", "incomplete", "shape", "size"],
)
def test_bad_manifest(artifact_copy: Path, command: list[str], change: Callable[[Any], object], text: str) -> None:
    edit_manifest(artifact_copy, change)
    prompt = ["Hi"] if command == ["generate"] else []
    assert_error(run_cli(*command, artifact_copy, *prompt), FAILURE, text)


@pytest.mark.parametrize("command", [["generate"], ["verify", "--files-only"]], ids=["generate", "verify"])
def test_truncated_weights(artifact_copy: Path, command: list[str]) -> None:
    os.truncate(artifact_copy / contract.WEIGHTS_FILE, 1000)
    prompt = ["Hi"] if command == ["generate"] else []
    result = run_cli(*command, artifact_copy, *prompt)
    assert_error(result, FAILURE, "weights.bin: 1000 bytes, and the manifest says", "truncated or altered")


@pytest.mark.parametrize("name", [contract.WEIGHTS_FILE, contract.TOKENIZER_FILE, contract.CALIBRATION_FILE])
@pytest.mark.parametrize("options", [[], ["--files-only"], ["--json"]], ids=["", "files-only", "json"])
def test_altered_file(artifact_copy: Path, name: str, options: list[str]) -> None:
    with (artifact_copy / name).open("r+b") as file:
        file.seek(500)
        byte = file.read(1)
        file.seek(500)
        file.write(bytes([byte[0] ^ 1]))
    result = run_cli("verify", artifact_copy, *options)
    assert_error(result, FAILURE, "1 of 5 checks failed: files match their hashes")
    assert f"{name}: altered since the build" in result.stdout
    if "--json" in options:
        assert [check["passed"] for check in json.loads(result.stdout)["checks"]] == [False, True, True, True, True]


def test_damaged_graph(artifact_copy: Path) -> None:
    path = artifact_copy / contract.DECODE_FILE
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert_error(run_cli("generate", artifact_copy, "Hi"), FAILURE, "decode.onnx: ONNX Runtime", "cannot load it")
    assert_error(run_cli("verify", artifact_copy), FAILURE, "decode.onnx passes onnx.checker")


@pytest.mark.parametrize("command", ["generate", "verify"])
def test_folder_that_is_no_artifact(command: str, tiny_model: Path) -> None:
    assert_error(run_cli(command, tiny_model, *["Hi"][: command == "generate"]), FAILURE, "this is not an artifact")


def test_verify_against_another_model(tiny_artifact: Path, other_model: Path) -> None:
    result = run_cli("verify", tiny_artifact, "--against", other_model)
    assert_error(result, FAILURE, "was built from another model than", "--against")


def test_verify_where_the_model_is_gone(artifact_copy: Path) -> None:
    edit_manifest(artifact_copy, lambda manifest: manifest["model"].update(name="/nowhere/model"))
    rehash(artifact_copy)
    result = run_cli("verify", artifact_copy)
    assert_error(result, FAILURE, "cannot be loaded", "/nowhere/model", "--against MODEL or --files-only")


BUDGETS = pytest.mark.parametrize(
    "budget", [["--cett", "0.2"], ["--sparsity", "0.3"], ["--max-kl", "0.1"]], ids=" ".join
)


@BUDGETS
def test_budget_of_a_griffin_artifact(griffin_artifact: Path, budget: list[str]) -> None:
    result = run_cli("generate", griffin_artifact, "Hi", *budget)
    assert_error(result, USAGE, "contains no calibration, so its budget is fixed")


@BUDGETS
def test_budget_of_an_artifact_without_calibration(artifact_copy: Path, budget: list[str]) -> None:
    edit_manifest(artifact_copy, lambda manifest: manifest["files"].pop(contract.CALIBRATION_FILE))
    result = run_cli("generate", artifact_copy, "Hi", *budget)
    assert_error(result, USAGE, "contains no calibration, so its budget is fixed. Leave the budget out")


@BUDGETS
def test_budget_of_top_k_selection(artifact_copy: Path, budget: list[str]) -> None:
    """Refused even with a calibration, because this artifact reads no thresholds."""
    edit_manifest(artifact_copy, lambda manifest: manifest["method"].update(selection="topk", density=0.5))
    result = run_cli("generate", artifact_copy, "Hi", *budget)
    assert_error(result, USAGE, "selects its neurons by rank, so it takes no other budget")


# Prompts


def test_prompt_longer_than_the_context(tiny_artifact: Path) -> None:
    assert_error(run_cli("generate", tiny_artifact, "x" * 600), FAILURE, "600 tokens and the context 512")
    result = run_cli("generate", tiny_artifact, "x" * 60, "--context", "50")
    assert_error(result, FAILURE, "60 tokens and the context 50", "raise the context")


def test_empty_prompt(tiny_artifact: Path) -> None:
    assert_error(run_cli("generate", tiny_artifact, ""), FAILURE, "The prompt is empty")
    assert_error(run_cli("generate", tiny_artifact, input=""), FAILURE, "The prompt is empty")


def test_chat_without_template(artifact_copy: Path) -> None:
    edit_manifest(artifact_copy, lambda manifest: manifest["files"].pop(contract.CHAT_TEMPLATE_FILE))
    assert_error(run_cli("generate", artifact_copy, "Hi", "--chat"), FAILURE, "no chat template. Leave --chat out")


@pytest.mark.parametrize("as_argument", [True, False], ids=["argument", "standard input"])
def test_prompt_that_is_not_utf8(tiny_artifact: Path, as_argument: bool) -> None:
    if as_argument:
        result = run_cli("generate", tiny_artifact, os.fsdecode(b"caf\xe9"))
    else:
        result = run_cli("generate", tiny_artifact, input=b"caf\xe9")
    assert_error(result, FAILURE, "UTF-8")


# A tokenizer with more tokens than the model


def test_token_that_the_model_does_not_have(
    artifact_copy: Path, tiny_model: Path, tmp_path: Path, outputs: Path
) -> None:
    add_token(artifact_copy, "<image_soft_token>")
    model = shutil.copytree(tiny_model, tmp_path / "model")
    shutil.copyfile(artifact_copy / contract.TOKENIZER_FILE, model / contract.TOKENIZER_FILE)
    parts = ("'<image_soft_token>', token 259 of the tokenizer", "the model's vocabulary ends at 258")
    for more in ((), ("--chat",), ("--repetition-penalty", 1.5, "--temperature", 1)):
        assert_error(run_cli("generate", artifact_copy, "see <image_soft_token>", *more), USAGE, *parts)
    (tmp_path / "text.txt").write_text("word <image_soft_token> " * 200)
    calibrated = run_cli("calibrate", model, "--dataset", tmp_path / "text.txt", "-o", outputs / "x", *CALIBRATE_TINY)
    assert_error(calibrated, USAGE, *parts)
