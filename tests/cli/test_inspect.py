"""`tda-export inspect`: its figures for a model are those of the artifact built from it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from tda_export.graph import contract
from tda_export.models.source import resolve_model
from tda_export.runtime.artifact import open_artifact
from tests.conftest import run_cli, run_ok
from tests.graph.test_parity import build_tiny
from tests.graph.test_priced import build_priced
from tests.tiny import FAMILIES, save_tiny_model

CONTEXT = 100


def inspected(*arguments: object) -> dict[str, Any]:
    return json.loads(run_ok("inspect", *arguments, "--context", CONTEXT, "--json").stdout)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_as_large_as_its_artifact(family: str, tmp_path: Path) -> None:
    model = save_tiny_model(family, tmp_path / "model")
    source = resolve_model(str(model))
    artifact = open_artifact(build_priced(source, tmp_path / "artifact", "separate"))
    before, after = inspected(model, "--dtype", "fp32"), inspected(artifact.folder)
    weights = artifact.manifest["weights"]
    stored = sum(math.prod(entry["shape"]) * contract.DTYPE_BYTES[entry["dtype"]] for entry in weights.values())
    assert before["artifact_bytes"] == stored
    assert (
        stored
        < after["artifact_bytes"]
        == sum(file.stat().st_size for file in artifact.folder.iterdir())
        - (artifact.folder / contract.MANIFEST_FILE).stat().st_size
    )
    own = {"model", "artifact_bytes"}
    assert {key: value for key, value in after.items() if key in before and key not in own} == {
        key: value for key, value in before.items() if key not in own
    }
    assert (after["layout"], after["method"], after["packing"]) == ("priced", "priced", "separate")
    assert before["ffn_bytes"] == 3 * before["ffn_matrices"] * 96 * 64 * 4 == artifact.dense_ffn_bytes
    assert before["linear_bytes"] == artifact.linear_bytes
    packed = inspected(build_priced(source, tmp_path / "packed", "sites"))
    masks = inspected(build_tiny(source, tmp_path / "masks"))
    for other in (packed, masks):
        assert [other[name] for name in ("ffn_bytes", "linear_bytes")] == [
            before[name] for name in ("ffn_bytes", "linear_bytes")
        ]
    assert (masks["layout"], masks["method"]) == ("indexed", "tda")
    assert "packing" not in masks
    assert before["session_bytes"] == stored + before["cache_bytes"]
    heads = before["kv_heads"] * before["head_size"]
    assert before["cache_bytes"] == 3 * CONTEXT * 2 * heads * 4


def test_ceiling_is_the_ratio_of_bytes(tiny_model: Path) -> None:
    result = inspected(tiny_model)
    assert result["dtype"] == "float16"
    hidden, ffn, vocabulary, kv = 64, 96, 259, 2 * 16
    layer = 3 * ffn * hidden + hidden * (hidden + 2 * kv) + hidden * hidden + 2 * hidden
    read = 2 * (3 * layer + hidden + vocabulary * hidden)  # the embedding is looked up
    read += 4 * (3 * (3 * hidden + ffn) + hidden)  # row prices of qkv, o, gate_up and down, and of the head
    dense = read + 3 * CONTEXT * 2 * kv * 2
    assert result["bytes_per_token"] == dense
    saved = 2 * 3 * 3 * ffn * hidden
    linears = saved + 2 * 3 * (hidden * (hidden + 2 * kv) + hidden * hidden)
    for name, skippable in (("ceiling", saved), ("linear_ceiling", linears)):
        assert result[name] == {str(p): pytest.approx(dense / (dense - p * skippable)) for p in (0.3, 0.5, 0.7)}
    assert (result["ffn_share"], result["linear_share"]) == (pytest.approx(saved / read), pytest.approx(linears / read))


def test_a_window_bounds_what_is_read_of_the_cache(tmp_path: Path) -> None:
    windowed, whole = (
        inspected(save_tiny_model("mistral-window", tmp_path / str(window), sliding_window=window))
        for window in (8, None)
    )
    row = 2 * 2 * 16 * 2
    assert whole["bytes_per_token"] - windowed["bytes_per_token"] == 3 * (CONTEXT - 8) * row
    assert whole["cache_bytes"] == windowed["cache_bytes"]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", ["RMS norms before attention and FFN", "silu FFN with gates", "rotary embedding"]),
        ("llama3-rope", ["rotary embedding, llama3 scaling"]),
        (
            "gemma2",
            ["before and after", "capped at 1.5", "a window of 8 tokens in 2 of 3", "logits capped at 2"],
        ),
        ("gemma3", ["gelu_tanh FFN with gates", "norms of queries and keys", "another rotary base"]),
        ("phi4-mini", ["rotary embedding of 12 of 16 elements, longrope scaling"]),
        ("smollm3", ["1 layers without rotary embedding"]),
        ("olmo2", ["RMS norms on the output of attention and FFN"]),
        ("opt-post-norm", ["layer norms after", "relu FFN without gates", "learned positions", "embeddings of 48"]),
        ("gpt-neox", ["attention and FFN side by side"]),
    ],
)
def test_features_are_named(family: str, expected: list[str], tmp_path: Path) -> None:
    output = run_ok("inspect", save_tiny_model(family, tmp_path / "model"), "--context", CONTEXT).stdout
    assert [words for words in expected if words not in output] == []


def test_artifact_in_words(tiny_artifact: Path) -> None:
    output = run_ok("inspect", tiny_artifact, "--context", CONTEXT).stdout
    assert "LlamaForCausalLM" in output
    assert "built with tda, sparsity 0.5, allocation kl, expected FFN sparsity 0." in output
    assert re.search(
        r"at 70% sparsity of the layers' linears at most \d\.\d+ times as fast as dense, of the FFN 1\.\d+ \(head "
        r"read whole\)",
        output,
    )
    assert "of them for the cache" in output


def test_artifact_of_prices_in_words(priced_artifact: Path) -> None:
    output = run_ok("inspect", priced_artifact, "--context", CONTEXT).stdout
    assert "built with priced, sparsity 0.5, price " in output
    assert "packing separate, expected sparsity of the layers' linears 0.500" in output
    assert "Prices with one threshold a matrix (separate)" in output
    assert "After prompts of 4 tokens in place of 32" in output
    result = inspected(priced_artifact)
    artifact = open_artifact(priced_artifact)
    assert result["price_table"] == artifact.manifest["price_table"]
    assert (result["price"], result["budget"]) == (artifact.manifest["price"], {"sparsity": 0.5})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dtype", "fp16"), "--dtype is for a MODEL; an artifact has its own. Leave --dtype out."),
        (("--context", 513), "513 tokens are more than the model's 512 positions. Lower --context."),
    ],
)
def test_usage(options: tuple[object, ...], message: str, tiny_artifact: Path) -> None:
    result = run_cli("inspect", tiny_artifact, *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_nothing_of_that_name(tmp_path: Path) -> None:
    result = run_cli("inspect", tmp_path / "nowhere")
    assert result.exit_code == 1
    assert "nowhere: no such folder" in result.stderr


def test_context_is_no_more_than_the_model_takes(tiny_artifact: Path) -> None:
    assert json.loads(run_ok("inspect", tiny_artifact, "--json").stdout)["context"] == 512
