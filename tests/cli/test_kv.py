"""Keys and values in 8 and in 16 bits on the command line: build, and the commands that run the result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tda_export.graph import contract
from tda_export.native.library import LIBRARY
from tda_export.runtime import load
from tda_export.runtime.artifact import open_artifact
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import decode
from tda_export.runtime.priced import PricedPrefill
from tests.cli.conftest import FAILURE, USAGE, assert_error
from tests.cli.results import PROMPT
from tests.conftest import build_tda, run_cli, run_ok
from tests.examples.applications import genai, minimal, ours
from tests.graph.test_manifest_schema import VALIDATOR
from tests.runtime.conftest import edit_manifest

SMALL = ("--prompts", 2, "--prompt-tokens", 24, "--continuation-tokens", 8)


@pytest.fixture(scope="module")
def built(tiny_model: Path, priced_calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verified artifact of prices, with the output of build beside it."""
    folder = tmp_path_factory.mktemp("kv")
    made = run_ok(
        "build", tiny_model, "--calibration", priced_calibration, "--kv", "int8", "-o", folder / "artifact", "--json"
    )
    (folder / "built.json").write_text(made.stdout)
    return folder / "artifact"


@pytest.fixture(scope="module")
def halves(tiny_model: Path, priced_calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verified artifact of prices with a cache of float16."""
    folder = tmp_path_factory.mktemp("halves") / "artifact"
    made = run_ok("build", tiny_model, "--calibration", priced_calibration, "--kv", "float16", "-o", folder, "--json")
    assert [check for check in json.loads(made.stdout)["checks"] if not check["passed"]] == []
    return folder


def test_a_cache_of_float16(halves: Path, priced_artifact: Path, tmp_path: Path) -> None:
    manifest = json.loads((halves / contract.MANIFEST_FILE).read_text())
    assert (manifest["kv"], manifest["shape"]["dtype"]) == ("float16", "float32")
    VALIDATOR.validate(manifest)
    found = {path: json.loads(run_ok("inspect", path, "--json").stdout) for path in (halves, priced_artifact)}
    assert 2 * found[halves]["cache_bytes"] == found[priced_artifact]["cache_bytes"]
    assert "of them for the cache, keys and values in float16\n" in run_ok("inspect", halves).stdout
    text = tmp_path / "text.txt"
    text.write_text("A tide table is a list of heights and hours. " * 12)
    assert json.loads(run_ok("eval", halves, "--text", text, *SMALL, "--json").stdout)["kl"] > 0
    timed = json.loads(run_ok("bench", halves, "--prompt-tokens", 32, "--new-tokens", 16, "--json").stdout)
    assert {"dense_native", "priced"} <= set(timed)


def test_applications_read_a_cache_of_float16(halves: Path, tmp_path: Path) -> None:
    expected = ours(halves, PROMPT, None, 16)
    assert minimal(halves, PROMPT, None, 16) == expected
    assert genai(halves, PROMPT, None, 16) == expected
    folder = Path(shutil.copytree(halves, tmp_path / "artifact"))
    shutil.copy(LIBRARY, folder)  # GenAI takes a library only from here
    assert genai(folder, PROMPT, None, 16, "--library", LIBRARY.name) == expected


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_takes_as_little(dtype: str, tiny_model: Path, priced_calibration: Path, tmp_path: Path) -> None:
    arguments = ("build", tiny_model, "--calibration", priced_calibration, "--kv", "float16", "--dtype", dtype)
    result = run_cli(*arguments, "-o", tmp_path / "artifact")
    taken = "keys and values take 16 bits already: leave --kv out."
    assert_error(result, USAGE, f"--kv float16 is for --dtype fp32. With {contract.DTYPES[dtype]}, {taken}")
    assert not (tmp_path / "artifact").exists()


def test_a_manifest_with_a_cache_of_float16_beside_float16(halves: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(halves, tmp_path / "artifact")
    edit_manifest(copy, lambda manifest: manifest["shape"].update(dtype="float16"))
    assert not VALIDATOR.is_valid(json.loads((copy / contract.MANIFEST_FILE).read_text()))
    assert_error(run_cli("generate", copy, PROMPT), FAILURE, "incomplete manifest (kv)")


def test_build_verifies_and_says_so(built: Path) -> None:
    checks = json.loads((built.parent / "built.json").read_text())["checks"]
    assert [check for check in checks if not check["passed"]] == []
    assert len(checks) == 11
    manifest = json.loads((built / contract.MANIFEST_FILE).read_text())
    assert manifest["kv"] == "int8"
    VALIDATOR.validate(manifest)
    assert not (built / contract.GENAI_CONFIG_FILE).exists()
    assert run_ok("verify", built).stdout.count(" ok ") == 11


def test_inspect_says_what_the_cache_takes(built: Path, priced_artifact: Path) -> None:
    found = {path: json.loads(run_ok("inspect", path, "--json").stdout) for path in (built, priced_artifact)}
    shape = open_artifact(built).shape
    rows = shape.num_layers * 2 * shape.num_kv_heads * found[built]["context"]
    assert (found[built]["kv"], found[priced_artifact]["kv"]) == ("int8", "float")
    assert found[built]["cache_bytes"] == rows * (shape.head_size + 4)
    assert found[priced_artifact]["cache_bytes"] == rows * 4 * shape.head_size
    assert "of them for the cache, keys and values in int8\n" in run_ok("inspect", built).stdout
    assert "of them for the cache, keys and values in float32\n" in run_ok("inspect", priced_artifact).stdout


def test_everything_runs_it(built: Path, tmp_path: Path) -> None:
    assert json.loads(run_ok("generate", built, PROMPT, "--max-new-tokens", 8, "--json").stdout)["text"]
    assert run_cli("chat", built, "--max-new-tokens", 8, input="The sea\nWhy?\n").exit_code == 0
    text = tmp_path / "text.txt"
    text.write_text("A tide table is a list of heights and hours. " * 12)
    quality = json.loads(run_ok("eval", built, "--text", text, *SMALL, "--json").stdout)
    assert 0 < quality["kl"] < 1
    timed = json.loads(run_ok("bench", built, "--prompt-tokens", 32, "--new-tokens", 16, "--json").stdout)
    assert {"dense_native", "priced"} <= set(timed)
    assert "dense" not in timed
    run_ok("report", built, "-o", tmp_path / "report.html")


@pytest.mark.parametrize("chunk", [1, 5, 24])
def test_logits_do_not_depend_on_where_a_call_begins(built: Path, chunk: int) -> None:
    """Tokens attend to stored codes, also to those of their own call."""
    model = load(built, provider="cpu")
    shape, sessions = model.artifact.shape, model.sessions
    tokens = list(range(5, 5 + 32))
    whole = KvCache(shape, "cpu", len(tokens))
    PricedPrefill(sessions, shape, whole).read(tokens[:8])
    expected = decode(sessions, whole, tokens[8:], None, sessions.dense_inputs)
    pieces, found = KvCache(shape, "cpu", len(tokens)), []
    PricedPrefill(sessions, shape, pieces).read(tokens[:8], chunk=3)
    for start in range(8, len(tokens), chunk):
        found.append(decode(sessions, pieces, tokens[start : start + chunk], None, sessions.dense_inputs))
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("method", "kv"), [("tda", "int8"), ("tda", "float16"), ("griffin", "int8")])
def test_masks_have_it_too(method: str, kv: str, tiny_model: Path, tiny_calibration: Path, tmp_path: Path) -> None:
    griffin = ("build", tiny_model, "--method", "griffin", "--sparsity", 0.5)
    arguments = griffin if method == "griffin" else build_tda(tiny_model, tiny_calibration)
    run_ok(*arguments, "--kv", kv, "-o", tmp_path / "artifact")
    assert run_ok("generate", tmp_path / "artifact", PROMPT, "--max-new-tokens", 8).stdout
    if kv == "float16":
        expected = ours(tmp_path / "artifact", PROMPT, None, 16)
        assert genai(tmp_path / "artifact", PROMPT, None, 16) == expected
    timed = run_ok(
        "bench", tmp_path / "artifact", "--method", "dense_native", "--prompt-tokens", 32, "--new-tokens", 16
    )
    assert "dense_native" in timed.stdout


def test_integer_weights_have_it_too(tiny_model: Path, priced_calibration: Path, tmp_path: Path) -> None:
    """Their prefill uses kernels as well."""
    weights = ("--weights", "int4", "--price", 0)
    arguments = ("build", tiny_model, "--calibration", priced_calibration, *weights, "--kv", "int8")
    run_ok(*arguments, "-o", tmp_path / "artifact")
    assert run_ok("generate", tmp_path / "artifact", PROMPT, "--max-new-tokens", 8).stdout


def test_half_precision_has_it_too(tiny_model: Path, priced_calibration: Path, tmp_path: Path) -> None:
    """On the CPU it runs by stock operators, and a line says why."""
    artifact = tmp_path / "artifact"
    arguments = ("build", tiny_model, "--calibration", priced_calibration, "--kv", "int8", "--dtype", "fp16")
    made = run_ok(*arguments, "--provider", "cpu", "-o", artifact, "--json")
    checks = json.loads(made.stdout)["checks"]
    assert [check for check in checks if not check["passed"]] == []
    assert len(checks) == 11
    manifest = json.loads((artifact / contract.MANIFEST_FILE).read_text())
    assert manifest["kv"] == "int8"
    assert open_artifact(artifact).shape.dtype == "float16"
    VALIDATOR.validate(manifest)
    assert run_ok("generate", artifact, PROMPT, "--provider", "cpu", "--max-new-tokens", 8).stdout


def test_the_cpu_has_no_bfloat16(tiny_model: Path, priced_calibration: Path, tmp_path: Path) -> None:
    arguments = ("build", tiny_model, "--calibration", priced_calibration, "--kv", "int8", "--dtype", "bf16")
    result = run_cli(*arguments, "--provider", "cpu", "-o", tmp_path / "artifact")
    assert_error(result, USAGE, "The CPU does not run bfloat16 artifacts. Build one with --dtype fp32.")
    assert not (tmp_path / "artifact").exists()


def test_dense_is_of_floats(built: Path) -> None:
    result = run_cli("bench", built, "--method", "dense", "--prompt-tokens", 32, "--new-tokens", 16)
    assert_error(
        result,
        USAGE,
        "dense is a graph in the model's dtype, and this artifact has others. Take --method dense_native.",
    )


@pytest.mark.parametrize(
    ("kv", "text"),
    [
        ("int4", "incomplete manifest (kv)"),
        (8, "incomplete manifest (kv)"),
        ("float", "an input past_key_values.0.key of tensor(int8)"),
    ],
)
def test_damaged_manifests(built: Path, kv: object, text: str, tmp_path: Path) -> None:
    copy = shutil.copytree(built, tmp_path / "artifact")
    edit_manifest(copy, lambda manifest: manifest.update(kv=kv))
    assert_error(run_cli("generate", copy, PROMPT), FAILURE, text)
