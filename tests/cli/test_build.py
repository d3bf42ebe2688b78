"""`tda-export build` and `verify` from end to end on the tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tda_export.bench.random_model import CHAT_TEMPLATE, byte_tokenizer
from tda_export.graph import contract
from tda_export.runtime import load
from tests.cli.results import CHECK_NAMES, PROMPT, generated, result_of
from tests.conftest import CALIBRATE_TINY, build_tda, run_cli, run_ok
from tests.tiny import save_tiny_model

DENSE_FFN_BYTES = 3 * 96 * 3 * 64 * 4  # layers, neurons, matrices, hidden size, float32
CHECKS = len(CHECK_NAMES)


def test_build_json(tiny_model: Path, tiny_calibration: Path, tmp_path: Path) -> None:
    output = tmp_path / "a"
    result = result_of(*build_tda(tiny_model, tiny_calibration), "-o", output)
    assert result["output"] == str(output)
    assert result["bytes"] == sum(path.stat().st_size for path in output.iterdir())
    assert result["budget"] == {"sparsity": 0.5, "allocation": "kl"}  # the calibration's own
    assert result["expected"]["kl"] > 0
    assert result["expected"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert [check["name"] for check in result["checks"]] == CHECK_NAMES
    assert all(check["passed"] for check in result["checks"])


def test_build_says_what_it_did(tiny_model: Path, tiny_calibration: Path, tmp_path: Path) -> None:
    arguments = (*build_tda(tiny_model, tiny_calibration), "-o")
    verified = run_ok(*arguments, tmp_path / "a")
    assert "sparsity 0.5, allocation kl: expected sparsity 0.500 of the FFN, predicted KL " in verified.stdout
    assert "MiB, verified)" in verified.stdout
    assert verified.stdout.count(" ok ") == CHECKS
    unverified = run_ok(*arguments, tmp_path / "b", "--no-verify")
    assert "MiB, not verified)" in unverified.stdout
    assert "Verification" not in unverified.stdout


def test_manifest(tiny_model: Path, tiny_artifact: Path) -> None:
    manifest = json.loads((tiny_artifact / contract.MANIFEST_FILE).read_text())
    assert (manifest["format"], manifest["format_version"]) == ("tda-export", contract.FORMAT_VERSION)
    assert manifest["model"]["name"] == str(tiny_model)
    assert manifest["method"]["name"] == "tda"
    assert manifest["budget"] == {"sparsity": 0.5, "allocation": "kl"}
    expected = manifest["expected"]
    assert expected["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert (manifest["thresholds"], manifest["token_thresholds"]) == (
        expected["thresholds"],
        expected["token_thresholds"],
    )
    assert manifest["survivors"] == pytest.approx(
        [token / mask for token, mask in zip(expected["token_density"], expected["density"], strict=True)]
    )
    assert (manifest["prior_tokens"], manifest["method"]["tail"]) == (64.0, "mean")
    assert manifest["refresh"] == {"tokens": 0, "decay": 1.0}
    on_disk = {path.name: path.stat().st_size for path in tiny_artifact.iterdir()}
    del on_disk[contract.MANIFEST_FILE]
    assert {name: entry["size"] for name, entry in manifest["files"].items()} == on_disk


def test_another_budget_needs_no_calibration(
    tiny_model: Path, tiny_calibration: Path, tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Build and generate choose from the same curves: an artifact built with a budget equals another at this budget."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("calibrated again")

    monkeypatch.setattr("tda_export.calibration.run.accumulate_curves", refuse)
    sparsities = []
    uniform = ("--allocation", "uniform")
    budgets = (
        ("--sparsity", "0.2"),
        ("--sparsity", "0.7"),
        ("--sparsity", "0.2", *uniform),
        ("--sparsity", "0.7", *uniform),
        ("--cett", "0.2"),
        ("--max-kl", "0.05"),
    )
    for budget in budgets:
        output = tmp_path / "".join(budget)
        built = result_of(
            *build_tda(tiny_model, tiny_calibration),
            *budget,
            "--no-verify",
            "-o",
            output,
        )
        assert list(built["budget"].values())[0] == float(budget[1])  # noqa: RUF015
        rebuilt, overridden = generated(output), generated(tiny_artifact, *budget)
        assert rebuilt["tokens"] == overridden["tokens"]
        assert rebuilt["metrics"]["sparsity"] == overridden["metrics"]["sparsity"]
        sparsities.append(rebuilt["metrics"]["sparsity"])
    own = generated(tiny_artifact)["metrics"]["sparsity"]
    assert 0 < sparsities[0] < own < sparsities[1] < 1
    assert 0 < sparsities[2] < own < sparsities[3] < 1


def test_build_by_max_kl(tiny_model: Path, tiny_calibration: Path, tmp_path: Path) -> None:
    def built(max_kl: float) -> Any:
        output = tmp_path / str(max_kl)
        arguments = (
            *build_tda(tiny_model, tiny_calibration),
            "--max-kl",
            max_kl,
            "-o",
            output,
        )
        return result_of(*arguments)

    strict, loose = built(0.02), built(0.06)
    assert (strict["budget"], loose["budget"]) == ({"max_kl": 0.02}, {"max_kl": 0.06})
    assert strict["expected"]["kl"] == pytest.approx(0.02)
    assert loose["expected"]["kl"] == pytest.approx(0.06)
    assert strict["expected"]["sparsity"] < loose["expected"]["sparsity"]
    assert [check["name"] for check in loose["checks"]] == CHECK_NAMES
    assert all(check["passed"] for check in [*strict["checks"], *loose["checks"]])


def test_build_with_refresh(tiny_model: Path, tiny_calibration: Path, tiny_artifact: Path, tmp_path: Path) -> None:
    """It becomes the default of generate and eval, also with another budget, and --refresh 0 turns it off."""
    output = tmp_path / "a"
    arguments = (
        *build_tda(tiny_model, tiny_calibration),
        "--refresh",
        5,
        "--no-verify",
        "-o",
        output,
    )
    run_ok(*arguments)
    manifest = json.loads((output / contract.MANIFEST_FILE).read_text())
    assert manifest["refresh"] == {"tokens": 5, "decay": 1.0}
    assert manifest["expected"]["sparsity"] == pytest.approx(0.5, abs=0.02)  # of all tokens; every fifth is dense
    default = ("--sparsity", "0.5")
    assert generated(output)["tokens"] == generated(tiny_artifact, "--refresh", 5, *default)["tokens"]
    for budget in (default, ("--sparsity", "0.3"), ("--cett", "0.2")):
        own, given = generated(output, *budget), generated(tiny_artifact, "--refresh", 5, *budget)
        assert own["tokens"] == given["tokens"]
        assert own["metrics"]["refreshes"] == given["metrics"]["refreshes"] == 4
        off = generated(output, "--refresh", 0, *budget)
        assert off["tokens"] == generated(tiny_artifact, *budget)["tokens"] != own["tokens"]
        assert off["metrics"]["refreshes"] == 0
    assert off["metrics"]["sparsity"] > own["metrics"]["sparsity"]  # with --cett; a sparsity would count refreshes
    dense = generated(output, "--mask", "dense")
    assert (dense["metrics"]["refreshes"], dense["metrics"]["sparsity"]) == (0, 0.0)


def test_refreshes_leave_too_much_to_the_steps_between(
    tiny_model: Path, tiny_calibration: Path, tmp_path: Path
) -> None:
    budget = ("--sparsity", 0.7, "--refresh", 4)
    result = run_cli(*(*build_tda(tiny_model, tiny_calibration), *budget, "-o", tmp_path / "a"))
    assert result.exit_code == 2
    assert "Sparsity 0.7, kl with a refresh every 4 tokens leaves 0.933 to the steps between. Sparsity" in result.stderr
    assert not (tmp_path / "a").exists()


def test_overwrite_replaces_an_artifact(
    tiny_model: Path, tiny_calibration: Path, tiny_artifact: Path, tmp_path: Path
) -> None:
    output = tmp_path / "a"
    shutil.copytree(tiny_artifact, output)
    (output / contract.GENERATION_CONFIG_FILE).unlink()  # an earlier output may be incomplete
    arguments = (
        *build_tda(tiny_model, tiny_calibration),
        "--sparsity",
        "0.2",
        "-o",
        output,
    )
    run_ok(*arguments, "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (output / contract.GENERATION_CONFIG_FILE).is_file()
    assert json.loads((output / contract.MANIFEST_FILE).read_text())["budget"]["sparsity"] == 0.2


def test_tail_mean(tiny_model: Path, tiny_calibration: Path, tmp_path: Path) -> None:
    """With a budget that has no tail mean of its own. Another such budget keeps it."""
    arguments = (
        *build_tda(tiny_model, tiny_calibration),
        "--sparsity",
        "0.5",
        "--allocation",
        "uniform",
    )
    for tail in ("mean", "zero"):
        built = result_of(*arguments, "--tail", tail, "-o", tmp_path / tail)
        names = [check["name"] for check in built["checks"]]
        assert names == [name for name in CHECK_NAMES[:-1] if tail == "mean" or name != "tail mean"]
        assert all(check["passed"] for check in built["checks"])
    for budget in ((), ("--cett", "0.3")):
        ours, zero = generated(tmp_path / "mean", *budget), generated(tmp_path / "zero", *budget)
        assert ours["metrics"]["sparsity"] == zero["metrics"]["sparsity"]
        assert ours["tokens"] != zero["tokens"]


def test_float16(tiny_model: Path, tiny_calibration: Path, tmp_path: Path) -> None:
    output = tmp_path / "a"
    arguments = (
        *build_tda(tiny_model, tiny_calibration),
        "--dtype",
        "fp16",
        "--provider",
        "cpu",
    )
    built = json.loads(run_ok(*arguments, "-o", output, "--json").stdout)
    assert all(check["passed"] for check in built["checks"])
    slow = run_ok("generate", output, PROMPT, "--max-new-tokens", 24, "--provider", "cpu", "--json")
    metrics = json.loads(slow.stdout)["metrics"]
    assert metrics["new_tokens"] == 24
    assert metrics["dense_bytes_per_token"] == DENSE_FFN_BYTES // 2


def test_griffin(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "a"
    built = result_of("build", tiny_model, "--method", "griffin", "--sparsity", "0.75", "-o", output)
    assert built["budget"] == {"sparsity": 0.75, "allocation": "uniform"}
    assert all(check["passed"] for check in built["checks"])
    for prompt in (PROMPT, "x", "def f(a):"):  # a prompt of one token has no scores
        metrics = result_of("generate", output, prompt, "--max-new-tokens", 2)["metrics"]
        assert metrics["sparsity"] == (0.0 if len(prompt) == 1 else 0.75)


def test_token_estimator(tiny_model: Path, tmp_path: Path) -> None:
    """The paper's own estimator from end to end."""
    calibration, output = tmp_path / "c", tmp_path / "a"
    result = result_of(
        "calibrate", tiny_model, "-o", calibration, *CALIBRATE_TINY, "--estimator", "token", "--cett", 0.2
    )
    assert result["settings"]["estimator"] == "token"
    assert all(0 < cett <= 0.2 for cett in result["allocation"]["cett"])
    built = result_of(*build_tda(tiny_model, calibration), "-o", output)
    assert built["budget"] == {"cett": 0.2}
    assert all(check["passed"] for check in built["checks"])
    assert 0 < generated(output)["metrics"]["sparsity"] < 1


def test_verify(tiny_artifact: Path) -> None:
    result = run_ok("verify", tiny_artifact)
    assert result.stdout.count(" ok ") == CHECKS
    checks = result_of("verify", tiny_artifact)["checks"]
    assert len(checks) == CHECKS
    for check in checks:
        assert check["passed"]
        assert check["problem"] is None
        assert check["allowed"] is None or 0 <= check["difference"] <= check["allowed"]


def test_model_of_a_short_context(tmp_path: Path) -> None:
    """The prompts of the verification are longer than this model's 128 positions."""
    model = save_tiny_model("llama", tmp_path / "model", max_position_embeddings=128)
    run_ok("calibrate", model, "-o", tmp_path / "c", *CALIBRATE_TINY)
    built = result_of(*build_tda(model, tmp_path / "c"), "-o", tmp_path / "a")
    assert [check["name"] for check in built["checks"]] == CHECK_NAMES
    assert all(check["passed"] for check in built["checks"])
    metrics = result_of("generate", tmp_path / "a", "x" * 120, "--max-new-tokens", 24)["metrics"]
    assert (metrics["new_tokens"], metrics["finish_reason"]) == (8, "context")


def test_several_chat_templates(tiny_model: Path, tiny_calibration: Path, tmp_path: Path) -> None:
    """transformers saves all templates but the default one in a folder, which artifacts leave out."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(model)
    assert (model / "additional_chat_templates").is_dir()
    output = tmp_path / "a"
    built = result_of(*build_tda(model, tiny_calibration), "-o", output)
    assert all(check["passed"] for check in built["checks"])
    assert all(path.is_file() for path in output.iterdir())
    rendered = load(output).text.chat([{"role": "user", "content": "Hi"}])
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    run_ok(*build_tda(model, tiny_calibration), "-o", output, "--no-verify", "--overwrite")


def test_chat_templates_without_a_default(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    set_templates(model, [{"name": "tool_use", "template": "{{ tools }}"}])
    built = run_ok("build", model, "--method", "griffin", "--sparsity", 0.5, "-o", tmp_path / "a", "--no-verify")
    note = f"Note: {model}: none of its chat templates is named 'default', so the artifact has none. To have one, name "
    assert built.stderr.count(note) == 1
    assert not load(tmp_path / "a").text.has_chat_template


def test_damaged_chat_templates_are_no_fault_of_the_disk(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    set_templates(model, [{"nme": "default"}])
    result = run_cli("build", model, "--method", "griffin", "--sparsity", 0.5, "-o", tmp_path / "a")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {model}: the model cannot be loaded ('name' is missing). Give a model")
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def set_templates(model: Path, templates: list[dict[str, str]]) -> None:
    """Give a model chat templates in the format of older releases of transformers."""
    (model / contract.CHAT_TEMPLATE_FILE).unlink(missing_ok=True)
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": templates}))


def test_verify_files_only(tiny_artifact: Path) -> None:
    names = [check["name"] for check in result_of("verify", tiny_artifact, "--files-only")["checks"]]
    assert names == CHECK_NAMES[:5]


def test_verify_against_a_moved_model(tiny_model: Path, tiny_artifact: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    assert len(result_of("verify", tiny_artifact, "--against", moved)["checks"]) == CHECKS
