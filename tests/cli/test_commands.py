"""The commands from end to end on the tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tda_export.bench.random_model import CHAT_TEMPLATE, byte_tokenizer
from tda_export.calibration.file import read_calibration
from tda_export.graph import contract
from tda_export.runtime import Sampling, load
from tests.conftest import CALIBRATE_TINY, run_cli, run_ok
from tests.tiny import save_tiny_model

PROMPT = "The sea is calm tonight"
DENSE_FFN_BYTES = 3 * 96 * 3 * 64 * 4  # layers, neurons, matrices, hidden size, float32
CHECK_NAMES = [
    "files match their hashes",
    "prefill.onnx passes onnx.checker",
    "decode.onnx passes onnx.checker",
    "decode_explicit.onnx passes onnx.checker",
    "prefill logits",
    "neuron scores",
    "selection of the mask",
    "tail mean",
    "decode with the prompt's mask",
    "decode token by token",
    "decode with token thresholds",
    "keys and values after chunked prefill",
    "mask after chunked prefill",
    "decode with all neurons",
    "decode with every second neuron",
    "statistics with the prior",
]
CHECKS = len(CHECK_NAMES)
ONE_LEVEL_CHECKS = [name for name in CHECK_NAMES if name not in ("tail mean", "statistics with the prior")]


def result_of(*arguments: object) -> Any:
    """Run with --json and require that standard output is JSON and nothing else."""
    result = run_ok(*arguments, "--json")
    assert result.stderr == ""
    return json.loads(result.stdout)


def generated(artifact: Path, *options: object) -> Any:
    return result_of("generate", artifact, PROMPT, "--max-new-tokens", 24, *options)


def test_calibrate(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "c.safetensors"
    result = run_ok("calibrate", tiny_model, "-o", output, *CALIBRATE_TINY)
    assert "prompt estimator, sparsity 0.5, kl" in result.stdout
    assert "up/down density" in result.stdout
    assert f"on 4 sequences; wrote {output}" in result.stdout
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
    """Builds take one-level budgets from it, without prior and tail mean."""
    output = tmp_path / "c.safetensors"
    result = result_of("calibrate", tiny_model, "-o", output, *CALIBRATE_TINY, "--curves-only", *options)
    assert result["settings"]["curves_only"]
    assert result["budget"] == budget
    allocation = result["allocation"]
    assert (allocation["token_thresholds"], allocation["kl"]) == ([], None)
    assert allocation["sparsity"] == pytest.approx(1 - sum(allocation["density"]) / 3)
    assert read_calibration(output).kl is None
    built = result_of("build", tiny_model, "--calibration", output, "-o", tmp_path / "a")
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


def test_less_text_than_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": "x" * 60}) + "\n" for _ in range(2)))
    result = run_ok(
        *("calibrate", tiny_model, "-o", tmp_path / "c", *CALIBRATE_TINY),
        *("--dataset", tmp_path / "rows.jsonl", "--text-column", "body"),
    )
    assert "holds text for 2 sequences of 48 tokens; calibrating on those" in result.stderr
    assert "on 2 sequences" in result.stdout


def test_names_in_brackets_are_shown_as_they_are(tiny_model: Path, tmp_path: Path) -> None:
    """Rich takes [v2] for markup."""
    model = shutil.copytree(tiny_model, tmp_path / "tiny[v2]")
    result = run_ok("calibrate", model, "-o", tmp_path / "c", *CALIBRATE_TINY)
    assert f"{model}, prompt estimator" in result.stdout


def test_build_json(tiny_model: Path, tiny_calibration: Path, tmp_path: Path) -> None:
    output = tmp_path / "a"
    result = result_of("build", tiny_model, "--calibration", tiny_calibration, "-o", output)
    assert result["output"] == str(output)
    assert result["bytes"] == sum(path.stat().st_size for path in output.iterdir())
    assert result["budget"] == {"sparsity": 0.5, "allocation": "kl"}  # the calibration's own
    assert result["expected"]["kl"] > 0
    assert result["expected"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert [check["name"] for check in result["checks"]] == CHECK_NAMES
    assert all(check["passed"] for check in result["checks"])


def test_build_says_what_it_did(tiny_model: Path, tiny_calibration: Path, tmp_path: Path) -> None:
    arguments = ("build", tiny_model, "--calibration", tiny_calibration, "-o")
    verified = run_ok(*arguments, tmp_path / "a")
    assert "sparsity 0.5, kl: expected FFN sparsity 0.500, predicted KL " in verified.stdout
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
    """Build and generate choose from the same curves: a rebuilt artifact equals the old one run with its budget."""

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
        built = result_of("build", tiny_model, "--calibration", tiny_calibration, *budget, "--no-verify", "-o", output)
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
        arguments = ("build", tiny_model, "--calibration", tiny_calibration, "--max-kl", max_kl, "-o", output)
        return result_of(*arguments)

    strict, loose = built(0.02), built(0.06)
    assert (strict["budget"], loose["budget"]) == ({"max_kl": 0.02}, {"max_kl": 0.06})
    assert strict["expected"]["kl"] == pytest.approx(0.02)
    assert loose["expected"]["kl"] == pytest.approx(0.06)
    assert strict["expected"]["sparsity"] < loose["expected"]["sparsity"]
    assert [check["name"] for check in loose["checks"]] == CHECK_NAMES
    assert all(check["passed"] for check in [*strict["checks"], *loose["checks"]])


def test_build_with_refresh(tiny_model: Path, tiny_calibration: Path, tiny_artifact: Path, tmp_path: Path) -> None:
    """It is the default of generate and eval there, of another budget too, and 0 turns it off."""
    output = tmp_path / "a"
    arguments = ("build", tiny_model, "--calibration", tiny_calibration, "--refresh", 5, "--no-verify", "-o", output)
    run_ok(*arguments)
    manifest = json.loads((output / contract.MANIFEST_FILE).read_text())
    assert manifest["refresh"] == {"tokens": 5, "decay": 1.0}
    for budget in ((), ("--sparsity", "0.3"), ("--cett", "0.2")):
        own, given = generated(output, *budget), generated(tiny_artifact, "--refresh", 5, *budget)
        assert own["tokens"] == given["tokens"]
        assert own["metrics"]["refreshes"] == given["metrics"]["refreshes"] == 4
        off = generated(output, "--refresh", 0, *budget)
        assert off["tokens"] == generated(tiny_artifact, *budget)["tokens"] != own["tokens"]
        assert off["metrics"]["refreshes"] == 0
        assert off["metrics"]["sparsity"] > own["metrics"]["sparsity"]
    dense = generated(output, "--mask", "dense")
    assert (dense["metrics"]["refreshes"], dense["metrics"]["sparsity"]) == (0, 0.0)


def test_generate_says_how_often_it_refreshed(tiny_artifact: Path) -> None:
    result = run_ok("generate", tiny_artifact, PROMPT, "--max-new-tokens", 24, "--refresh", 8)
    assert ", 2 refreshes\n" in result.stderr
    assert "refreshes" not in run_ok("generate", tiny_artifact, PROMPT, "--max-new-tokens", 24).stderr


def test_generate_by_max_kl(tiny_artifact: Path) -> None:
    strict, loose = generated(tiny_artifact, "--max-kl", 0.02), generated(tiny_artifact, "--max-kl", 0.06)
    assert 0 < strict["metrics"]["sparsity"] < loose["metrics"]["sparsity"] < 1


def test_overwrite_replaces_an_artifact(
    tiny_model: Path, tiny_calibration: Path, tiny_artifact: Path, tmp_path: Path
) -> None:
    output = tmp_path / "a"
    shutil.copytree(tiny_artifact, output)
    (output / contract.GENERATION_CONFIG_FILE).unlink()  # an earlier output need not be a whole one
    arguments = ("build", tiny_model, "--calibration", tiny_calibration, "--sparsity", "0.2", "-o", output)
    run_ok(*arguments, "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (output / contract.GENERATION_CONFIG_FILE).is_file()
    assert json.loads((output / contract.MANIFEST_FILE).read_text())["budget"]["sparsity"] == 0.2


def test_tail_mean(tiny_model: Path, tiny_calibration: Path, tmp_path: Path) -> None:
    """Of a budget that does not bring it; another budget of that kind leaves it."""
    arguments = ("build", tiny_model, "--calibration", tiny_calibration, "--sparsity", "0.5", "--allocation", "uniform")
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
    arguments = ("build", tiny_model, "--calibration", tiny_calibration, "--dtype", "fp16", "--provider", "cpu")
    built = json.loads(run_ok(*arguments, "-o", output, "--json").stdout)
    assert all(check["passed"] for check in built["checks"])
    slow = run_ok("generate", output, PROMPT, "--max-new-tokens", 24, "--provider", "cpu", "--json")
    metrics = json.loads(slow.stdout)["metrics"]
    assert metrics["new_tokens"] == 24
    assert metrics["dense_ffn_bytes_per_token"] == DENSE_FFN_BYTES // 2


def test_griffin(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "a"
    built = result_of("build", tiny_model, "--method", "griffin", "--sparsity", "0.75", "-o", output)
    assert built["budget"] == {"sparsity": 0.75, "allocation": "uniform"}
    assert all(check["passed"] for check in built["checks"])
    for prompt in (PROMPT, "x", "def f(a):"):  # every prompt keeps as many, save one token, of which nothing is known
        metrics = result_of("generate", output, prompt, "--max-new-tokens", 2)["metrics"]
        assert metrics["sparsity"] == (0.0 if len(prompt) == 1 else 0.75)


def test_token_estimator(tiny_model: Path, tmp_path: Path) -> None:
    """The paper's reading from end to end."""
    calibration, output = tmp_path / "c", tmp_path / "a"
    result = result_of(
        "calibrate", tiny_model, "-o", calibration, *CALIBRATE_TINY, "--estimator", "token", "--cett", 0.2
    )
    assert result["settings"]["estimator"] == "token"
    assert all(0 < cett <= 0.2 for cett in result["allocation"]["cett"])
    built = result_of("build", tiny_model, "--calibration", calibration, "-o", output)
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
    """Verification's own prompts are longer than this model's 128 positions."""
    model = save_tiny_model("llama", tmp_path / "model", max_position_embeddings=128)
    run_ok("calibrate", model, "-o", tmp_path / "c", *CALIBRATE_TINY)
    built = result_of("build", model, "--calibration", tmp_path / "c", "-o", tmp_path / "a")
    assert [check["name"] for check in built["checks"]] == CHECK_NAMES
    assert all(check["passed"] for check in built["checks"])
    metrics = result_of("generate", tmp_path / "a", "x" * 120, "--max-new-tokens", 24)["metrics"]
    assert (metrics["new_tokens"], metrics["finish_reason"]) == (8, "context")


def test_several_chat_templates(tiny_model: Path, tiny_calibration: Path, tmp_path: Path) -> None:
    """transformers saves all but the default one into a folder, which artifacts leave out."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(model)
    assert (model / "additional_chat_templates").is_dir()
    output = tmp_path / "a"
    built = result_of("build", model, "--calibration", tiny_calibration, "-o", output)
    assert all(check["passed"] for check in built["checks"])
    assert all(path.is_file() for path in output.iterdir())
    rendered = load(output).text.chat([{"role": "user", "content": "Hi"}])
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    run_ok("build", model, "--calibration", tiny_calibration, "-o", output, "--no-verify", "--overwrite")


def test_verify_files_only(tiny_artifact: Path) -> None:
    names = [check["name"] for check in result_of("verify", tiny_artifact, "--files-only")["checks"]]
    assert names == CHECK_NAMES[:4]


def test_verify_against_a_moved_model(tiny_model: Path, tiny_artifact: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    assert len(result_of("verify", tiny_artifact, "--against", moved)["checks"]) == CHECKS


def test_generate(tiny_artifact: Path) -> None:
    result = run_ok("generate", tiny_artifact, PROMPT, "--max-new-tokens", 24)
    expected = load(tiny_artifact).generate(PROMPT, max_new_tokens=24)
    list(expected)
    assert result.stdout == expected.text + "\n"
    assert f"{len(PROMPT)} prompt tokens, 24 new (as many as asked for), tda on cpu, FFN sparsity 0." in result.stderr
    assert "s to the first token" in result.stderr
    assert "MiB of FFN weights a token" in result.stderr


def test_generate_json(tiny_artifact: Path) -> None:
    result = generated(tiny_artifact)
    generation = load(tiny_artifact).generate(PROMPT, max_new_tokens=24)
    assert result["tokens"] == [token.id for token in generation]
    assert result["text"] == generation.text
    metrics = result["metrics"]
    assert (metrics["mask"], metrics["provider"], metrics["finish_reason"]) == ("tda", "cpu", "length")
    assert (metrics["prompt_tokens"], metrics["new_tokens"]) == (len(PROMPT), 24)
    assert 1 - metrics["density"] < metrics["sparsity"] == generation.metrics.sparsity
    assert metrics["ffn_bytes_per_token"] == round((1 - metrics["sparsity"]) * DENSE_FFN_BYTES)
    assert metrics["dense_ffn_bytes_per_token"] == DENSE_FFN_BYTES
    assert metrics["decode_tokens_per_second"] == pytest.approx(23 / metrics["decode_seconds"])


def test_generate_one_token(tiny_artifact: Path) -> None:
    """There is no second token that a rate could start at."""
    result = run_ok("generate", tiny_artifact, PROMPT, "--max-new-tokens", 1)
    assert "1 new (as many as asked for)" in result.stderr
    assert "tokens/s" not in result.stderr


@pytest.mark.parametrize(
    ("text", "prompt"),
    [(PROMPT, PROMPT), (f"{PROMPT}\n", PROMPT), (f"{PROMPT}\n\n", f"{PROMPT}\n"), (f"\n{PROMPT} ", f"\n{PROMPT} ")],
    ids=["as it is", "echo's newline", "only one newline", "nothing else"],
)
def test_prompt_from_standard_input(tiny_artifact: Path, text: str, prompt: str) -> None:
    options = ("--json", "--max-new-tokens", 24)
    result = run_cli("generate", tiny_artifact, *options, input=text)
    assert result.exit_code == 0
    metrics = json.loads(result.stdout)["metrics"]
    assert metrics["prompt_tokens"] == len(prompt)
    assert json.loads(result.stdout)["tokens"] == result_of("generate", tiny_artifact, prompt, *options[1:])["tokens"]


def test_generated_text_ends_in_half_a_character(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was held back comes last on standard output too, whether the length or an end of text stops it."""
    text = load(tiny_artifact).text
    half = [*text.encode("é"), text.encode("世")[0]]
    for tokens, count in ((half, len(half)), ([*half, 2], 10)):
        script = iter(tokens)
        monkeypatch.setattr("tda_export.runtime.model.make_sampler", lambda sampling, s=script: lambda _: next(s))
        result = run_ok("generate", tiny_artifact, PROMPT, "--max-new-tokens", count)
        assert result.stdout == "é\N{REPLACEMENT CHARACTER}\n"


def test_chat(tiny_artifact: Path) -> None:
    rendered = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    expected = result_of("generate", tiny_artifact, rendered, "--max-new-tokens", 24)
    assert generated(tiny_artifact, "--chat")["tokens"] == expected["tokens"]
    assert generated(tiny_artifact)["tokens"] != expected["tokens"]


def test_dense(tiny_artifact: Path) -> None:
    dense = generated(tiny_artifact, "--mask", "dense")
    assert (dense["metrics"]["mask"], dense["metrics"]["sparsity"]) == ("dense", 0.0)
    assert dense["metrics"]["ffn_bytes_per_token"] == DENSE_FFN_BYTES
    assert dense["tokens"] != generated(tiny_artifact)["tokens"]
    assert generated(tiny_artifact, "--sparsity", "0")["tokens"] == dense["tokens"]


def test_sampling(tiny_artifact: Path) -> None:
    options = ("--temperature", "1", "--top-k", "50", "--top-p", "0.9", "--seed")
    one, again, other = (generated(tiny_artifact, *options, seed)["tokens"] for seed in (1, 1, 2))
    assert one == again != other


def test_stop_strings(tiny_artifact: Path) -> None:
    text = generated(tiny_artifact)["text"]
    first, second = text[6:8], text[3:5]
    stopped = generated(tiny_artifact, "--stop", first, "--stop", second)
    cut = min(text.index(first), text.index(second))
    assert (stopped["text"], stopped["metrics"]["finish_reason"]) == (text[:cut], "stop")
    result = run_ok("generate", tiny_artifact, PROMPT, "--stop", first, "--stop", second)
    assert result.stdout == f"{text[:cut]}\n"


def test_repetition_penalty(tiny_artifact: Path) -> None:
    sampling = Sampling(repetition_penalty=1.4)
    expected = load(tiny_artifact).generate(PROMPT, max_new_tokens=24, sampling=sampling)
    ours = generated(tiny_artifact, "--repetition-penalty", 1.4)
    assert ours["tokens"] == [token.id for token in expected] != generated(tiny_artifact)["tokens"]


def test_context(tiny_artifact: Path) -> None:
    result = generated(tiny_artifact, "--context", len(PROMPT) + 5)
    assert len(result["tokens"]) == 5
    assert result["metrics"]["finish_reason"] == "context"
