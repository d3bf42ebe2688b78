"""Integer weights on the command line: quantize, calibrate, build, and the commands that run the result."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tda_export.calibration.file import read_calibration
from tda_export.float_kl import COLUMN
from tda_export.graph import contract
from tda_export.runtime.artifact import open_artifact
from tests.cli.conftest import USAGE, assert_error
from tests.conftest import run_cli, run_ok
from tests.few_prices import few_prices  # noqa: F401 - a fixture

LENGTHS = ("--prompt-tokens", "24", "--continuation-tokens", "8")


@pytest.fixture(scope="module")
def quantised(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised") / "model"
    run_ok("quantize", tiny_model, "-o", folder, "--sequences", "4", "--kl-sequences", "2", *LENGTHS, "--quiet")
    return folder


@pytest.fixture(scope="module")
def calibration(quantised: Path) -> Path:
    path = quantised.parent / "c.safetensors"
    shown = run_ok("calibrate", quantised, "-o", path, "--sequences", "4", *LENGTHS).stdout
    lost = json.loads((quantised / "config.json").read_text())["quantization_config"]["loss"]["kl"]
    assert f" {lost:.4f} │ " in shown  # of dense
    return path


@pytest.fixture(scope="module")
def artifact(quantised: Path, calibration: Path) -> Path:
    folder = quantised.parent / "artifact"
    built = run_ok("build", quantised, "--calibration", calibration, "--sparsity", "0.3", "-o", folder)
    assert "nats a token; KL to the float model about 0." in built.stdout
    return folder


def test_a_quantised_model_is_built_with_its_table(artifact: Path) -> None:
    opened = open_artifact(artifact)
    assert opened.price_table is not None
    assert opened.price_table.formats == "int4_g32+int8_g32"  # of the linears, and of the head
    assert opened.prices_head
    assert opened.manifest["packing"] == "sites"
    formats = {matrix.format.name for name, matrix in opened.matrices.items() if contract.in_a_layer(name)}
    assert formats == {"int4_g32"}
    known = opened.manifest["model"]["quantization"]
    assert known["quantizer"]["name"] == "gptq"
    assert 0 < known["loss"]["kl"] < 0.2


def test_it_generates_and_answers_to_budgets(artifact: Path) -> None:
    metrics = {}
    for budget in ((), ("--price", "0"), ("--sparsity", "0.2"), ("--max-kl", "0.01")):
        result = run_ok("generate", artifact, "The tide", "--max-new-tokens", "8", *budget, "--json")
        metrics[budget] = json.loads(result.stdout)["metrics"]
    assert metrics["--price", "0"]["sparsity"] < 0.01  # from inputs that are zero
    assert metrics[()]["sparsity"] > metrics["--sparsity", "0.2"]["sparsity"] > 0


def test_inspect_says_what_the_integers_cost(artifact: Path, quantised: Path) -> None:
    shown = run_ok("inspect", artifact).stdout
    assert "quantised by gptq" in shown
    assert "KL to the float model about " in shown
    assert re.search(r"linears of the layers \d MiB in int4_g32, \d+% of the weights", shown)
    known = [json.loads(run_ok("inspect", place, "--json").stdout) for place in (artifact, quantised)]
    assert known[0]["linear_bytes"] == known[1]["linear_bytes"]
    assert known[0]["linear_formats"] == known[1]["linear_formats"] == ["int4_g32"]


def test_tables_have_the_kl_to_the_float_model(artifact: Path, calibration: Path, tmp_path: Path) -> None:
    """For an artifact and a calibration: the KL that `quantize` measured, and that which each price adds."""
    opened = open_artifact(artifact)
    assert opened.price_table is not None
    lost = opened.manifest["model"]["quantization"]["loss"]["kl"]
    assert read_calibration(calibration).provenance["model"]["quantization"]["loss"]["kl"] == lost
    shown = run_ok("inspect", artifact).stdout
    assert all(f" {lost + row.kl:.4f} │ " in shown for row in opened.price_table.rows)
    page = tmp_path / "report.html"
    for place in (artifact, calibration):
        run_ok("report", place, "-o", page, "--overwrite")
        text = page.read_text()
        assert f"what they lost to the float model, {lost:.4f} nats a token, comes on top of it." in text
        assert f"{lost:.4f} by the integers and " in text
        for row in opened.price_table.rows:
            assert f">{lost + row.kl:.4f}<" in text


def test_tables_of_floats_have_one_kl(priced_artifact: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    run_ok("report", priced_artifact, "-o", page)
    assert not [words for words in ("float model", COLUMN) if words in page.read_text()]
    assert "float" not in run_ok("inspect", priced_artifact).stdout.partition("Prices with")[2]


def test_eval_and_verify(artifact: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The tide came in and the boats went out again, as they did on every day of the year. " * 20)
    options = ("--text", text, "--prompts", "2", *LENGTHS, "--json")
    row = json.loads(run_ok("eval", artifact, *options, "--method", "priced").stdout)
    assert 0.5 < row["linear_bytes"] / open_artifact(artifact).linear_bytes < 1
    run_ok("verify", artifact)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--weights", "int4"], "as they are, and rounded ones have another KL. Make a model of them with 'tda-export"),
        (["--weights-for", "head=int4"], "as they are, and rounded ones have another KL. Make a model of them with"),
        (["--weights-for", "head"], "--weights-for: 'head' is not PATTERN=FORMAT."),
        (["--weights-for", "layers.*.z=int8"], "--weights-for: layers.*.z matches no matrix."),
        (["--weights-for", "head=int3"], "--weights-for: int3 is not a format."),
        (["--weights", "int4", "--group", "16"], "'16' is not one of"),
        (
            ["--group", "64"],
            "--group has no effect where all weights are floats. Leave it out, or give --weights int4.",
        ),
        (["--group", "64", "--weights-for", "head=float"], "--group has no effect where all weights are floats."),
        (
            ["--weights", "int4", "--weights-for", "*.v=int8", "--packing", "sites", "--price", "0"],
            "layers.0.q, layers.0.k, layers.0.v have different formats, and lie side by side.",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_refusals(options: list[str], words: str, tiny_model: Path, priced_calibration: Path, tmp_path: Path) -> None:
    result = run_cli("build", tiny_model, "--calibration", priced_calibration, *options, "-o", tmp_path / "a")
    assert_error(result, USAGE, words)
    assert not (tmp_path / "a").exists()


def prepared(model: Path, folder: Path, *options: object) -> tuple[Path, Path]:
    """A model rounded to nearest, and its calibration."""
    made, calibration = folder / "rounded", folder / "rounded.safetensors"
    run_ok("quantize", model, "-o", made, "--quantizer", "rtn", "--kl-sequences", "0", *options)
    run_ok("calibrate", made, "-o", calibration, "--sequences", "2", *LENGTHS, "--labels", "1")
    return made, calibration


@pytest.mark.parametrize("group", [64, 128])
def test_groups_that_do_not_end_with_a_part(group: int, tiny_model: Path, tmp_path: Path) -> None:
    """Keys have 32 outputs. In sites, parts would share groups, so they are stored apart."""
    model, calibration = prepared(tiny_model, tmp_path, "--group", group)
    run_ok("build", model, "--calibration", calibration, "-o", tmp_path / "a")
    opened = open_artifact(tmp_path / "a")
    assert opened.manifest["packing"] == "separate"
    assert opened.price_table is not None
    assert opened.price_table.formats == f"int4_g{group}+int8_g{group}"
    sites = ("--packing", "sites", "-o", tmp_path / "b")
    result = run_cli("build", model, "--calibration", calibration, *sites)
    assert_error(result, USAGE, "has no table of prices for --packing sites.")
    result = run_cli("calibrate", model, "--packing", "sites", "-o", tmp_path / "c", "--sequences", "2", *LENGTHS)
    assert_error(result, USAGE, "or columns that are not whole groups, and cannot lie side by side.")


def test_floats_of_another_size_beside_integers(tiny_model: Path, tmp_path: Path) -> None:
    """A price is of a byte. Floats need the same price as integers, because the table has one price for all."""
    model, calibration = prepared(tiny_model, tmp_path, "--weights-for", "layers.0.*=float")
    arguments = ("build", model, "--calibration", calibration, "-o", tmp_path / "a")
    words = "was measured with floats of 4 bytes beside the integers, and these are of 2. Choose the --dtype that was"
    assert_error(run_cli(*arguments, "--dtype", "fp16"), USAGE, words)
    run_ok(*arguments, "--dtype", "fp16", "--price", "0", "--no-verify")
    assert open_artifact(tmp_path / "a").price_table is None
    run_ok(*arguments, "--overwrite")
    table = open_artifact(tmp_path / "a").price_table
    assert table is not None
    assert table.formats.startswith("mixed-")
    assert " MiB in float32 and int4_g32, " in run_ok("inspect", tmp_path / "a").stdout
    assert " MiB in float16 and int4_g32, " in run_ok("inspect", model).stdout


def test_rules_that_leave_floats_alone(tiny_model: Path, priced_calibration: Path, tmp_path: Path) -> None:
    rules = ("--weights-for", "head=float")
    built = run_ok("build", tiny_model, "--calibration", priced_calibration, *rules, "-o", tmp_path / "a")
    assert "rounded" not in built.stderr
    manifest = open_artifact(tmp_path / "a").manifest
    assert manifest["model"]["quantization"] is None
    assert manifest["price_table"] is not None
    griffin = ("--method", "griffin", "--sparsity", "0.5", "--no-verify", "-o", tmp_path / "b")
    run_ok("build", tiny_model, *griffin, *rules)


def test_inspect_of_rounded_weights(tiny_model: Path, priced_calibration: Path, tmp_path: Path) -> None:
    options = ("--weights", "int4", "--price", "0", "--no-verify")
    built = run_ok("build", tiny_model, "--calibration", priced_calibration, *options, "-o", tmp_path / "a")
    assert "Weights are rounded to the nearest integers; 'tda-export quantize' loses less." in built.stderr
    shown = run_ok("inspect", tmp_path / "a").stdout
    assert "quantised by rtn: 2 matrices int8_g32, 12 matrices int4_g32; KL to the float model not measured" in shown


def test_masks_are_of_floats(tiny_model: Path, quantised: Path, tiny_calibration: Path, tmp_path: Path) -> None:
    arguments = ("--method", "griffin", "--sparsity", "0.5", "-o", tmp_path / "a")
    for model, more in ((tiny_model, ("--weights", "int8")), (quantised, ())):
        result = run_cli("build", model, *arguments, *more)
        assert_error(result, USAGE, "--method griffin needs a float model. Give one")


@pytest.mark.parametrize("method", ["tda", "all"])
def test_masks_of_a_quantised_model_are_not_calibrated(
    method: str, quantised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tda_export.calibration.corpus.load_corpus", None)
    result = run_cli("calibrate", quantised, "--method", method, "-o", tmp_path / "c.safetensors", *LENGTHS)
    words = f"--method {method}: masks need a float model, and {quantised} is quantised. Calibrate the"
    assert_error(result, USAGE, words)


@pytest.mark.parametrize("option", [("--weights", "int8"), ("--group", "128"), ("--weights-for", "head=float")])
def test_a_quantised_model_is_stored_as_it_is(
    option: tuple[str, str], quantised: Path, calibration: Path, tmp_path: Path
) -> None:
    result = run_cli("build", quantised, "--calibration", calibration, *option, "-o", tmp_path / "a")
    words = "is quantised already, and keeps its formats. Leave --weights, --group and --weights-for out, or give the"
    assert_error(result, USAGE, words)


def test_an_artifact_is_benched_as_it_is(artifact: Path) -> None:
    for option in (("--weights", "int8"), ("--group", "128"), ("--weights-for", "head=float")):
        words = f"{option[0]} is for --shape only; an artifact has its own. Leave it out."
        assert_error(run_cli("bench", artifact, *option), USAGE, words)
