"""The benchmark checks logits before it times, and describes the measurement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tda_export.bench import decode as decode_module
from tda_export.bench.bandwidth import copy_bandwidth
from tda_export.bench.decode import MASK_METHODS, METHODS, BenchSettings, run_bench
from tda_export.bench.runners import DenseRunner, SparseRunner, TruncationRunner, ffn_inputs
from tda_export.bench.shapes import SHAPES, RandomWeights, random_source
from tda_export.bench.timing import Spread, speedup, take_turns
from tda_export.cli import bench as bench_command
from tda_export.errors import TdaError, UsageError
from tda_export.models.source import ModelSource, resolve_model
from tda_export.runtime.artifact import Artifact, open_artifact
from tda_export.runtime.session import Sessions
from tests.conftest import run_cli, run_ok
from tests.graph.test_parity import build_tiny
from tests.tiny import save_tiny_model

PROMPT = list(range(5, 69))
SHORT = ("--prompt-tokens", 64, "--new-tokens", 32)
ALL_METHODS = [word for name in MASK_METHODS for word in ("--method", name)]
SMALL = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="module")
def source(tiny_model: Path) -> ModelSource:
    return resolve_model(str(tiny_model))


@pytest.fixture(scope="module")
def artifact(source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return open_artifact(build_tiny(source, tmp_path_factory.mktemp("bench") / "artifact"))


@pytest.fixture(scope="module")
def sessions(artifact: Artifact) -> Sessions:
    return Sessions(artifact, "cpu")


def test_plain_dense_graph_is_the_model(artifact: Artifact, sessions: Sessions, source: ModelSource) -> None:
    runner = DenseRunner(artifact, sessions, 100)
    runner.prefill(PROMPT)
    tokens = runner.steps(20)
    with torch.inference_mode():
        logits = source.reference()(torch.tensor([[*PROMPT, 7]])).logits[0, -1].numpy()
    runner.prefill(PROMPT)
    np.testing.assert_allclose(runner.logits(7), logits, atol=1e-4)
    assert len(set(tokens)) > 1
    assert tokens == greedy_without_end(source, 21)[1:]


def greedy_without_end(source: ModelSource, count: int) -> list[int]:
    """Return greedy tokens of transformers, past an end of text."""
    tokens = list(PROMPT)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(source.reference()(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(PROMPT) :]


def test_the_plain_dense_graph_holds_no_operator_of_ours(artifact: Artifact) -> None:
    import onnx

    from tda_export.graph.derive import derived_dense

    model = onnx.load_model_from_string(derived_dense(artifact))
    assert {node.domain for node in model.graph.node} == {"", "com.microsoft"}
    assert not model.functions


def test_probe_gives_what_goes_into_each_ffn(artifact: Artifact, sessions: Sessions, source: ModelSource) -> None:
    seen: list[np.ndarray] = []
    model = source.reference()
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0].numpy()))
        for layer in model.model.layers
    ]
    with torch.inference_mode():
        model(torch.tensor([[*PROMPT, 9, 11]]))
    for hook in hooks:
        hook.remove()
    for ours, expected in zip(ffn_inputs(artifact, sessions, PROMPT, [9, 11]), seen, strict=True):
        np.testing.assert_allclose(ours, expected[-2:], atol=1e-4)


def test_json(artifact: Artifact) -> None:
    result = json.loads(run_ok("bench", artifact.folder, *SHORT, *ALL_METHODS, "--sparsity", 0.5, "--json").stdout)
    assert result["speedup"] == result["tda"]["speedup"] > 0
    assert (result["prompt_tokens"], result["new_tokens"], result["native"]) == (64, 32, True)
    dense_bytes = 3 * 96 * 3 * 64 * 4
    for name in MASK_METHODS:
        row = result[name]
        low, high = row["ms_per_token_range"]
        assert 0 < low <= row["ms_per_token"] <= high
        assert row["skippable_bytes_per_token"] == pytest.approx((1 - row["sparsity"]) * dense_bytes)
        assert row["share_of_copy_bandwidth"] > 0
        assert row["bytes_per_token"] > row["skippable_bytes_per_token"]
    assert [result[name]["sparsity"] for name in ("dense", "dense_native", "tda", "griffin")] == [0, 0, 0.5, 0.5]
    assert result["two_levels"]["sparsity"] == pytest.approx(0.5, abs=0.15)  # thresholds are used on other tokens


def test_token_thresholds_of_the_artifact_do_not_count(tiny_artifact: Path) -> None:
    """Every method sets its own thresholds, and is checked against a graph with the same ones."""
    assert open_artifact(tiny_artifact).deployment.token_thresholds.all()
    methods = ("--method", "tda", "--method", "griffin", "--method", "dense_native")
    run_ok("bench", tiny_artifact, *methods, "--prompt-tokens", 24, "--new-tokens", 16, "--provider", "cpu", "--json")


def test_table(artifact: Artifact) -> None:
    shown = run_ok("bench", artifact.folder, *SHORT)
    for name in ("dense", "dense_native", "tda", "griffin"):
        assert f" {name} " in shown.stdout
    assert "64 + 32 tokens, native kernels" in shown.stdout
    assert shown.stderr.splitlines()[-3:] == ["Loading…", "Checking logits…", "Measuring…"]


def test_shape_of_a_config(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    result = json.loads(
        run_ok("bench", "--shape", path, *SHORT, "--method", "dense", "--method", "tda", "--json").stdout
    )
    assert result["dtype"] == "float32"
    assert result["tda"]["sparsity"] == 0.5


@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes_are_supported(name: str) -> None:
    source = random_source(name)
    assert source.spec.num_layers == SHAPES[name]["num_hidden_layers"]
    weights = source.weights()
    assert weights.shape(f"{source.spec.names.up.format(i=0)}.weight") == (
        source.spec.ffn_size,
        source.spec.hidden_size,
    )


def test_random_weights_are_scaled_and_differ() -> None:
    weights = RandomWeights({"a": (300, 500), "b": (300, 500), "norm": (64,)})
    one, other, norm = (weights.load(name) for name in ("a", "b", "norm"))
    assert float(one.std()) == pytest.approx(500**-0.5, rel=0.02)
    assert not torch.equal(one, other)
    assert float(norm.mean()) == pytest.approx(1.0, abs=0.1)
    assert torch.equal(weights.load("a"), one)


@pytest.mark.parametrize("name", ["dense_native", "tda", "two_levels"])
def test_wrong_logits_are_not_timed(artifact: Artifact, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    original = SparseRunner.logits
    wrong = {"dense_native": None, "tda": None, "two_levels": None} | {name: 1.0}

    def logits(runner: SparseRunner, token: int) -> np.ndarray:
        kind = "dense_native" if runner.mask is None else ("two_levels" if runner.second_level else "tda")
        return original(runner, token) + (wrong[kind] or 0.0)

    monkeypatch.setattr(SparseRunner, "logits", logits)
    monkeypatch.setattr(decode_module, "take_turns", lambda *arguments: pytest.fail("timed"))
    with pytest.raises(TdaError, match=rf"{name}: its logits are .* from the reference, so nothing was timed"):
        run_bench(artifact, "cpu", BenchSettings(MASK_METHODS, prompt_tokens=64, new_tokens=32), PROMPT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give an ARTIFACT, or a --shape to bench with random weights."),
        (["ARTIFACT", "--shape", "llama-2-7b"], "Give either an ARTIFACT or a --shape, not both."),
        (["ARTIFACT", "--dtype", "fp16"], "--dtype is for --shape only; an artifact has its own. Leave it out."),
        (["ARTIFACT", "--weights", "int4"], "--weights is for --shape only; an artifact has its own. Leave it out."),
        (["--shape", "llama-9"], "Unknown shape 'llama-9'. Give a config.json, or one of smollm2-135m,"),
        (["ARTIFACT", "--method", "tda", "--method", "tda"], "A method is named twice. Name each one once."),
        (["ARTIFACT", "--method", "fastest"], "'fastest' is not one of"),
        (["ARTIFACT", "--sparsity", "1"], "is not in the range 0<=x<1"),
    ],
)
def test_usage(artifact: Artifact, arguments: list[str], message: str) -> None:
    words = [str(artifact.folder) if word == "ARTIFACT" else word for word in arguments]
    result = run_cli("bench", *words)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(("content", "reason"), [("{", "Expecting"), ("[]", "no attribute"), ("{}", "no model_type")])
def test_config_that_cannot_be_read(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    result = run_cli("bench", "--shape", path)
    assert result.exit_code == 2
    assert f"{path}: not a readable config.json (" in result.stderr
    assert reason in result.stderr


def test_lengths_that_do_not_fit(artifact: Artifact) -> None:
    result = run_cli("bench", artifact.folder, "--prompt-tokens", 500, "--new-tokens", 16)
    assert result.exit_code == 1
    assert "500 and 16 tokens are more than the model's 512 positions. Shorten one of them." in result.stderr


def test_artifact_of_another_method(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "griffin"
    run_ok("build", tiny_model, "--method", "griffin", "--sparsity", 0.5, "-o", output, "--no-verify")
    result = run_cli("bench", output, *SHORT)
    assert result.exit_code == 2
    assert "was built with --method griffin, which tda cannot be derived from" in result.stderr
    run_ok("bench", output, *SHORT, "--method", "dense", "--method", "griffin")


def test_artifact_without_a_second_level(source: ModelSource, tmp_path: Path) -> None:
    from tda_export.graph.method import tda

    plain = build_tiny(source, tmp_path / "plain", method=tda("zero"))
    result = run_cli("bench", plain, *SHORT, "--method", "two_levels")
    assert result.exit_code == 2
    assert "was built without token thresholds. Leave two_levels out." in result.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ("fast",)}, "Unknown method 'fast'"),
        ({"sparsity": 1.0}, "Sparsity 1.0 is outside"),
        ({"prompt_tokens": 1}, "Give a prompt of 2 tokens or more"),
        ({"new_tokens": 15}, "and 16 new ones or more"),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BenchSettings(**settings)


def test_methods_of_the_command_are_those_of_the_benchmark() -> None:
    assert bench_command.METHODS == METHODS


def test_take_turns() -> None:
    order: list[str] = []
    seconds = take_turns({name: lambda name=name: order.append(name) for name in "abc"}, 3)  # type: ignore[misc]
    assert "".join(order) == "abccbaabc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_speedup_compares_the_same_rounds() -> None:
    assert speedup([2.0, 8.0, 3.0], [1.0, 2.0, 2.0]) == Spread(2.0, 1.5, 4.0)


def test_copy_bandwidth_is_that_of_a_computer() -> None:
    assert 0.1 < copy_bandwidth("cpu") < 10_000


@pytest.mark.parametrize("method", ["dense_native", "tda", "two_levels", "griffin"])
def test_wrong_logits_of_any_method_are_not_timed(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    nothing = np.full(artifact.shape.vocab_size, np.nan, np.float32)
    monkeypatch.setattr(SparseRunner, "logits", lambda self, token: nothing)
    with pytest.raises(TdaError, match=f"{method}: its logits are nan from the reference"):
        run_bench(artifact, "cpu", BenchSettings((method,), 0.5, 64, 32), PROMPT)


def test_wrong_logits_of_truncation_are_not_timed(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = np.full(artifact.shape.vocab_size, np.nan, np.float32)
    monkeypatch.setattr(TruncationRunner, "logits", lambda self, token: nothing)
    with pytest.raises(TdaError, match="tt: its logits are nan from the reference"):
        run_bench(artifact, "cpu", BenchSettings(("tt",), 0.5, 64, 32), PROMPT)


def test_truncation_keeps_the_share_of_neurons_that_was_asked_for(artifact: Artifact) -> None:
    result = run_bench(artifact, "cpu", BenchSettings(("dense", "tt"), 0.6, 64, 32), PROMPT)
    assert result["tt"]["sparsity"] == pytest.approx(0.6 / 3, abs=0.05)


@pytest.mark.parametrize(("method", "least", "most"), [("dense_native", 0.1, 0.4), ("tda", 0.505, 0.7)])
def test_bytes_of_inactive_neurons_do_not_count(method: str, least: float, most: float, tmp_path: Path) -> None:
    """ReLU makes about half of a random model's neurons inactive. Their down rows are not read."""
    opt = resolve_model(str(save_tiny_model("opt", tmp_path / "model")))
    artifact = open_artifact(build_tiny(opt, tmp_path / "artifact"))
    result = run_bench(artifact, "cpu", BenchSettings((method,), 0.5, 64, 32), PROMPT)
    assert least < result[method]["sparsity"] < most


def test_two_levels_need_tokens_to_choose_thresholds_on() -> None:
    with pytest.raises(UsageError, match="two_levels needs 32 new tokens or more"):
        BenchSettings(("two_levels",), 0.5, 64, 31)


@pytest.mark.parametrize("config", [{"model_type": "nosuch"}, SMALL | {"hidden_size": "x"}])
def test_config_that_transformers_refuses(tmp_path: Path, config: dict[str, Any]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    result = run_cli("bench", "--shape", path, *SHORT)
    assert result.exit_code == 2, result.output
    assert "not a usable config.json" in result.stderr


def test_prices_of_an_artifact(priced_artifact: Path) -> None:
    result = json.loads(run_ok("bench", priced_artifact, *SHORT, "--sparsity", 0.3, "--json").stdout)
    assert [result[name]["sparsity"] for name in ("dense", "dense_native")] == [0, 0]
    assert result["priced"]["sparsity"] == pytest.approx(0.3, abs=0.15)  # the price is used on other text
    shown = run_ok("bench", priced_artifact, *SHORT, "--method", "priced")
    assert " priced " in shown.stdout


@pytest.mark.parametrize("name", ["tda", "griffin", "two_levels", "tt"])
def test_masks_do_not_run_on_prices(priced_artifact: Path, name: str) -> None:
    result = run_cli("bench", priced_artifact, *SHORT, "--method", name)
    assert result.exit_code == 2
    assert f"{name} does not run on an artifact of the layout priced" in result.stderr
    assert "'tda-export build MODEL --method tda'" in result.stderr


def test_prices_do_not_run_on_masks(artifact: Artifact) -> None:
    result = run_cli("bench", artifact.folder, *SHORT, "--method", "priced")
    assert result.exit_code == 2
    assert "priced does not run on an artifact of the layout indexed" in result.stderr


def test_random_rows_read_exactly_what_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    result = json.loads(run_ok("bench", "--shape", path, *SHORT, "--sparsity", 0.5, "--json").stdout)
    for name, sparsity in (("priced_0.70", 0.3), ("priced_0.50", 0.5)):
        assert result[name]["sparsity"] == pytest.approx(sparsity, abs=0.03)  # up to whole rows
    both = run_cli("bench", "--shape", path, *SHORT, "--method", "priced", "--method", "tda")
    assert both.exit_code == 2
    assert "priced and tda need different artifacts" in both.stderr


def test_integers(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    shape = ("--shape", path, *SHORT)
    floats, integers = (
        json.loads(run_ok("bench", *shape, "--method", "dense_native", "--method", "priced", *more, "--json").stdout)
        for more in ((), ("--weights", "int4"))
    )
    assert list(integers)[-3:] == ["dense_native", "priced_0.70", "priced_0.50"]
    sizes = [result["dense_native"]["skippable_bytes_per_token"] for result in (floats, integers)]
    assert sizes[1] / sizes[0] == pytest.approx(4.625 / 32, rel=0.05)
    assert integers["priced_0.50"]["sparsity"] == pytest.approx(0.5, abs=0.03)
    dense = run_cli("bench", *shape, "--weights", "int4", "--method", "dense")
    assert dense.exit_code == 2
    assert (
        "dense is a graph in the model's dtype, and this artifact has others. Take --method dense_native."
        in dense.stderr
    )
    masks = run_cli("bench", *shape, "--weights", "int4", "--method", "tda")
    assert masks.exit_code == 2
    assert "tda needs float weights. Leave --weights and --weights-for out." in masks.stderr
