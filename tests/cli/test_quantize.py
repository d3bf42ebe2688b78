"""`tda-export quantize`: its folder is a model for the other commands; errors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import TINY_LENGTHS, run_cli, run_ok

LENGTHS = ("--prompt-tokens", "32", "--continuation-tokens", "16")
FEW = ("--sequences", "4", "--kl-sequences", "2", *LENGTHS)
PARTS = ("q", "k", "v", "o", "gate", "up", "down")

DESCRIBED = (
    "quantised by gptq: 21 matrices int4_g32, 2 matrices int8_g32, the head by input channel; KL to the float model 0."
)


@pytest.fixture(scope="module")
def quantised(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised") / "int4"
    result = run_ok("quantize", tiny_model, "-o", folder, *FEW)
    assert DESCRIBED in result.stdout
    assert " nats a token over 32 tokens, " in result.stdout
    assert result.stdout.endswith(f"Wrote {folder}\n")
    assert not folder.with_name("int4.partial").exists()
    return folder


def test_what_the_folder_says(quantised: Path, tiny_model: Path) -> None:
    content = json.loads((quantised / "config.json").read_text())["quantization_config"]
    assert content["quant_method"] == "tda_export"
    how = {"name": "gptq", "symmetric": False, "least_damping": 0.01, "first_token_weight": 100.0}
    assert content["quantizer"] == how
    assert content["data"]["name"] == "builtin"
    assert (content["data"]["sequences"], content["data"]["kl_sequences"]) == (4, 2)
    assert content["model"]["name"] == str(tiny_model)
    assert 0 < content["loss"]["kl"] < 0.2
    assert content["loss"]["tokens"] == 32


def test_inspect_shows_formats_and_loss(quantised: Path) -> None:
    text = run_ok("inspect", quantised).stdout
    assert DESCRIBED in text
    shown = json.loads(run_ok("inspect", quantised, "--json").stdout)
    assert shown["quantization"]["formats"]["layers.0.q"] == "int4_g32"
    assert shown["quantization"]["loss"]["sequences"] == 2


@pytest.mark.parametrize(
    "change",
    [
        {"loss": {"kl": "much"}},
        {"loss": {"kl": float("nan"), "stderr": 0, "agreement": 1, "tokens": 32}},
        {"loss": {"kl": 0.1, "stderr": 10**400, "agreement": 1, "tokens": 32}},
        {"loss": 5},
        {"quantizer": None},
        {"quantizer": {"name": "gptq"}},
    ],
    ids=lambda change: str(change)[:30],
)
def test_inspect_of_a_config_that_was_changed(quantised: Path, tmp_path: Path, change: dict[str, object]) -> None:
    folder = shutil.copytree(quantised, tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    expected = (
        "quantised: 21 matrices int4_g32, 2 matrices int8_g32; config.json does not say how, or not what was lost"
    )
    assert expected in run_ok("inspect", folder).stdout


def test_the_folder_is_calibrated_built_and_run(quantised: Path, tmp_path: Path) -> None:
    calibration = tmp_path / "calibration.safetensors"
    run_ok("calibrate", quantised, "-o", calibration, "--sequences", "2", *LENGTHS, "--labels", "1")
    run_ok("build", quantised, "--calibration", calibration, "--dtype", "fp32", "-o", tmp_path / "artifact")
    run_ok("generate", tmp_path / "artifact", "Hi", "--max-new-tokens", "4")


def test_rounding_and_rules_as_json(tiny_model: Path, tmp_path: Path) -> None:
    rules = ("--weights-for", "layers.*.v=int8,layers.1.*=float", "--weights-for", "head=int4")
    options = ("--quantizer", "rtn", "--symmetric", "--kl-sequences", "0", "--group", "64")
    result = run_ok("quantize", tiny_model, "-o", tmp_path / "out", *rules, *options, "--json")
    content = json.loads(result.stdout)
    assert content["output"] == str(tmp_path / "out")
    assert content["quantizer"] == {"name": "rtn", "symmetric": True}
    assert "data" not in content
    formats = content["formats"]
    assert (formats["layers.0.v"], formats["layers.1.v"], formats["head"]) == ("int8_g64", "float", "int4_g64")
    text = run_ok("inspect", tmp_path / "out").stdout
    assert "quantised by rtn, symmetric: " in text
    assert "7 matrices float" in text
    assert "KL to the float model not measured" in text


def test_a_mean_of_bits(tiny_model: Path, tmp_path: Path) -> None:
    output, options = tmp_path / "out", ("--bits-per-weight", "6", "--weights-for", "layers.0.*=int4", *FEW)
    stdout = run_ok("quantize", tiny_model, "-o", output, *options).stdout
    bits = re.search(r"int8_g32 \((\S+) bits a weight of the linears\), the head by input channel; KL to", stdout)
    assert bits is not None
    assert 5.7 < float(bits[1]) <= 6
    content = json.loads((output / "config.json").read_text())["quantization_config"]
    assert content["mixture"]["most_bits_per_weight"] == 6
    assert (content["mixture"]["sequences"], content["mixture"]["labels"]) == (2, 4)
    formats = content["formats"]
    assert {formats[f"layers.0.{part}"] for part in PARTS} == {"int4_g32"}
    assert set(formats.values()) == {"int4_g32", "int8_g32"}
    wide = {part: sum(formats[f"layers.{layer}.{part}"] == "int8_g32" for layer in range(3)) for part in PARTS}
    assert "Linears in int8: " + ", ".join(f"{part} {count} of 3" for part, count in wide.items()) in stdout
    assert f"({bits[1]} bits a weight of the linears)" in run_ok("inspect", output).stdout
    shown = json.loads(run_ok("quantize", tiny_model, "-o", tmp_path / "again", *options, "--json").stdout)
    assert (shown["mixture"], shown["formats"]) == (content["mixture"], formats)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "out"]
    run_ok("calibrate", output, "-o", tmp_path / "c", *TINY_LENGTHS)
    run_ok("build", output, "--calibration", tmp_path / "c", "-o", tmp_path / "a")
    run_ok("generate", tmp_path / "a", "Once", "--max-new-tokens", "4")


def test_a_mean_of_bits_and_no_measurement(tiny_model: Path, tmp_path: Path) -> None:
    """Rounding then reads text to estimate losses."""
    options = ("--bits-per-weight", "7", "--quantizer", "rtn", "--kl-sequences", "0", "--seed", "1", *LENGTHS)
    content = json.loads(run_ok("quantize", tiny_model, "-o", tmp_path / "out", *options, "--json").stdout)
    assert (content["data"]["sequences"], content["data"]["kl_sequences"]) == (8, 0)
    assert 6.5 < content["mixture"]["bits_per_weight"] <= 7


def test_an_earlier_folder_is_replaced_on_demand(quantised: Path, tiny_model: Path, tmp_path: Path) -> None:
    arguments = ("quantize", tiny_model, "--quantizer", "rtn", "--kl-sequences", "0", "-o")
    output = tmp_path / "out"
    run_ok(*arguments, output)
    refused = run_cli(*arguments, output)
    assert refused.exit_code == 2
    assert f"{output} exists. Choose another output, or replace it with --overwrite." in refused.stderr
    run_ok(*arguments, output, "--overwrite")
    refused = run_cli(*arguments, tiny_model, "--overwrite")
    assert f"{tiny_model} exists and is not a quantised model, so it is not replaced." in refused.stderr


def refusal(*arguments: object) -> str:
    result = run_cli("quantize", *arguments)
    assert result.exit_code == 2
    return result.stderr.strip().splitlines()[-1]


def test_a_quantised_model_is_refused(quantised: Path, tmp_path: Path) -> None:
    assert refusal(quantised, "-o", tmp_path / "out") == (
        f"Error: {quantised} is quantised already. Give the float model that it was made from."
    )


def test_what_is_refused_before_any_work(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tda_export.calibration.corpus.load_corpus", None)
    output = tmp_path / "out"
    rule = refusal(tiny_model, "-o", output, "--weights-for", "layers.*.x=int8")
    assert rule.startswith("Error: --weights-for: layers.*.x matches no matrix. They are layers.0.q to layers.2.down ")
    assert "'nothing' is not PATTERN=FORMAT" in refusal(tiny_model, "-o", output, "--weights-for", "nothing")
    assert "are more than the 512 positions of" in refusal(tiny_model, "-o", output, "--prompt-tokens", "500")
    assert "--device tpu is not known" in refusal(tiny_model, "-o", output, "--device", "tpu")
    bits = refusal(tiny_model, "-o", output, "--bits-per-weight", "4.5")
    assert bits.startswith(
        "Error: --bits-per-weight 4.5: the linears take 4.658 bits a weight in int4 and 8.750 in int8, "
    )
    rules = refusal(tiny_model, "-o", output, "--bits-per-weight", "5", "--weights-for", "layers.*=int4")
    assert rules.startswith("Error: --bits-per-weight: --weights-for fixes the format of every linear, so there is ")
    assert "no effect with --weights int8" in refusal(
        tiny_model, "-o", output, "--bits-per-weight", "5", "--weights", "int8"
    )
    assert "'48' is not one of" in refusal(tiny_model, "-o", output, "--group", "48")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out.partial").write_text("mine")
    assert refusal(tiny_model, "-o", output) == (
        f"Error: {tmp_path}/out.partial exists, and finished layers are stored there until all are done. Move it "
        "away, or choose another output."
    )


def test_options_of_text_that_is_not_read(tiny_model: Path, tmp_path: Path) -> None:
    rounded = (tiny_model, "-o", tmp_path / "out", "--quantizer", "rtn")
    assert refusal(*rounded, "--sequences", "60") == (
        "Error: --sequences has no effect with --quantizer rtn. Leave one of them out."
    )
    for option in (
        ("--dataset", "nofile.txt"),
        ("--text-column", "text"),
        ("--seed", "0"),
        ("--prompt-tokens", "32"),
        ("--continuation-tokens", "16"),
    ):
        assert refusal(*rounded, "--kl-sequences", "0", *option) == (
            f"Error: {option[0]} has no effect with --quantizer rtn --kl-sequences 0, which reads no text. Leave one "
            "of them out."
        )
    run_ok("quantize", *rounded, "--kl-sequences", "1", "--seed", "1", *LENGTHS)


def test_less_text_than_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "some.txt"
    text.write_text("A few words of text, again and again. " * 8)
    result = run_ok("quantize", tiny_model, "-o", tmp_path / "out", "--dataset", text, *FEW, "--sequences", "40")
    assert "has text for 6 sequences of 48 tokens; using those." in result.stderr
    content = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["data"]
    assert (content["sequences"], content["kl_sequences"]) == (5, 1)


def test_too_little_text(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "some.txt"
    text.write_text("A few words of text, and just about enough of them for one sequence.")
    message = refusal(tiny_model, "-o", tmp_path / "out", "--dataset", text, *FEW)
    assert "GPTQ reads sequences and measures on others, and 1 is too few for that." in message


def test_an_interrupted_run_goes_on(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are kept beside the output, and removed once it is written."""
    from tda_export.quantization import run

    original, calls = run.pass_on, iter(range(10))

    def broken(*arguments: object) -> None:
        if next(calls) == 2:  # after both of the first layer
            raise KeyboardInterrupt
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run, "pass_on", broken)
        assert run_cli("quantize", tiny_model, "-o", tmp_path / "out", *FEW).exit_code == 130
    assert len(list((tmp_path / "out.partial").iterdir())) == 2
    run_ok("quantize", tiny_model, "-o", tmp_path / "out", *FEW)
    run_ok("quantize", tiny_model, "-o", tmp_path / "whole", *FEW)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
