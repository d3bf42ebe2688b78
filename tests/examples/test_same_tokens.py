"""One artifact, one prompt, the same greedy tokens in every application."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tda_export.calibration.budgets import Budget
from tda_export.graph import contract
from tda_export.graph.export import BuildRequest, export_artifact
from tda_export.graph.indexed import IndexedDesign
from tda_export.graph.method import tda
from tda_export.graph.storage import Storage
from tda_export.models.source import resolve_model
from tda_export.native.library import LIBRARY
from tda_export.runtime import load
from tda_export.runtime.generate import MaskMode
from tests.conftest import build_tda, run_ok
from tests.examples.applications import EXAMPLES, Applications, genai, ours
from tests.runtime.conftest import edit_manifest

PROMPT = "The sea is calm tonight"
TOKENS = 64
NAMES = ["genai", "minimal", pytest.param("node", marks=pytest.mark.node), "cpp"]


@pytest.fixture(scope="module")
def griffin_artifact(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with one level, top-k, and no tail mean. Its decode takes no token thresholds."""
    path = tmp_path_factory.mktemp("griffin") / "artifact"
    run_ok("build", tiny_model, "--method", "griffin", "--sparsity", "0.5", "--no-verify", "-o", path)
    return path


@pytest.fixture(scope="module")
def empty_artifact(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with thresholds that no score reaches, so that masks are empty."""
    path, source = tmp_path_factory.mktemp("empty") / "artifact", resolve_model(str(tiny_model))
    design = IndexedDesign(tda(), [10.0] * source.spec.num_layers)
    request = BuildRequest(source, Storage("float32"), design, Budget(sparsity=0.5).describe())
    export_artifact(request, path, quiet=True, check=lambda folder: None)
    return path


def test_minimal_driver_is_short() -> None:
    assert len((EXAMPLES / "python_minimal.py").read_text().splitlines()) < 90


def test_dense_and_masked_tokens_differ(tiny_artifact: Path) -> None:
    """Otherwise equal tokens would show nothing about masks."""
    assert ours(tiny_artifact, PROMPT, "tda", TOKENS) != ours(tiny_artifact, PROMPT, "dense", TOKENS)


@pytest.mark.parametrize("mask", ["tda", "dense"])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_our_driver(
    name: str, mask: MaskMode, tiny_artifact: Path, applications: Applications
) -> None:
    expected = ours(tiny_artifact, PROMPT, mask, TOKENS)
    assert len(expected) == TOKENS
    assert applications.named(name)(tiny_artifact, PROMPT, mask, TOKENS) == expected


@pytest.mark.parametrize("mask", [None, "dense"], ids=["priced", "dense"])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_at_a_price(name: str, mask: MaskMode | None, priced_artifact: Path, applications: Applications) -> None:
    expected = ours(priced_artifact, PROMPT, mask, TOKENS)
    assert len(expected) == TOKENS
    assert applications.named(name)(priced_artifact, PROMPT, mask, TOKENS) == expected


@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_integers(name: str, integer_artifact: Path, applications: Applications) -> None:
    expected = ours(integer_artifact, PROMPT, None, 16)
    assert applications.named(name)(integer_artifact, PROMPT, None, 16) == expected


def test_genai_takes_the_kernels_of_a_library_in_the_folder(integer_artifact: Path, tmp_path: Path) -> None:
    """As docs/artifact-format.md describes. Without the file GenAI refuses, so the library is in use."""
    folder = Path(shutil.copytree(integer_artifact, tmp_path / "artifact"))
    path = folder / contract.GENAI_CONFIG_FILE
    config = json.loads(path.read_text())
    config["model"]["decoder"]["session_options"]["custom_ops_library"] = LIBRARY.name
    path.write_text(json.dumps(config))
    with pytest.raises(AssertionError, match="cannot open shared object file"):
        genai(folder, PROMPT, None, 16)
    shutil.copyfile(LIBRARY, folder / LIBRARY.name)
    assert genai(folder, PROMPT, None, 16) == ours(integer_artifact, PROMPT, None, 16)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.65])
@pytest.mark.parametrize("name", NAMES[1:])
def test_price_is_turned_at_run_time(
    name: str, sparsity: float, priced_artifact: Path, applications: Applications
) -> None:
    price = load(priced_artifact, provider="cpu").at(sparsity=sparsity).price
    expected = ours(priced_artifact, PROMPT, None, TOKENS, price)
    assert (expected == ours(priced_artifact, PROMPT, "dense", TOKENS)) == (sparsity == 0)
    assert expected != ours(priced_artifact, PROMPT, None, TOKENS)
    assert applications.priced(name, priced_artifact, PROMPT, TOKENS, price) == expected


@pytest.mark.parametrize("name", NAMES)
def test_other_methods_run_too(name: str, griffin_artifact: Path, applications: Applications) -> None:
    expected = ours(griffin_artifact, PROMPT, "tda", 16)
    assert applications.named(name)(griffin_artifact, PROMPT, "tda", 16) == expected


@pytest.mark.parametrize("method", ["tda", "priced"])
@pytest.mark.parametrize("name", ["genai", "minimal"])
def test_float16(
    name: str,
    method: str,
    tiny_model: Path,
    tiny_calibration: Path,
    priced_calibration: Path,
    applications: Applications,
    tmp_path: Path,
) -> None:
    path, half = tmp_path / "artifact", ("--dtype", "fp16", "--no-verify")
    calibration = {"tda": tiny_calibration, "priced": priced_calibration}[method]
    run_ok("build", tiny_model, "--method", method, "--calibration", calibration, *half, "-o", path)
    assert applications.named(name)(path, PROMPT, None, 16) == ours(path, PROMPT, None, 16)


@pytest.mark.node
def test_node_refuses_other_dtypes(
    tiny_model: Path, tiny_calibration: Path, applications: Applications, tmp_path: Path
) -> None:
    path, half = tmp_path / "artifact", ("--dtype", "fp16", "--no-verify")
    run_ok(*build_tda(tiny_model, tiny_calibration), *half, "-o", path)
    with pytest.raises(AssertionError, match="build it with --dtype fp32"):
        applications.node(path, PROMPT, "tda", 16)


@pytest.mark.parametrize("name", NAMES)
def test_empty_masks(name: str, empty_artifact: Path, applications: Applications) -> None:
    expected = ours(empty_artifact, PROMPT, "tda", 16)
    assert applications.named(name)(empty_artifact, PROMPT, "tda", 16) == expected


@pytest.mark.parametrize("name", NAMES)
def test_answer_ends_at_a_stop_token(
    name: str, tiny_artifact: Path, applications: Applications, tmp_path: Path
) -> None:
    tokens = ours(tiny_artifact, PROMPT, "tda", 16)
    stop = next(token for token in tokens[8:] if token not in tokens[:8])
    folder = Path(shutil.copytree(tiny_artifact, tmp_path / "artifact"))
    edit_manifest(folder, lambda manifest: manifest["model"].update(eos_token_ids=[2, stop]))
    config = json.loads((folder / contract.GENAI_CONFIG_FILE).read_text())
    config["model"]["eos_token_id"] = [2, stop]
    (folder / contract.GENAI_CONFIG_FILE).write_text(json.dumps(config))
    if name == "cpp":  # it reads no JSON
        answer = applications.cpp(folder, PROMPT, "tda", 16, "--eos", stop)
    else:
        answer = applications.named(name)(folder, PROMPT, "tda", 16)
    assert answer == tokens[: tokens.index(stop)]


@pytest.mark.parametrize("built", ["tiny_artifact", "priced_artifact"])
def test_native_kernels_in_genai(built: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """GenAI takes a library only from the folder of its configuration."""
    artifact = request.getfixturevalue(built)
    folder = Path(shutil.copytree(artifact, tmp_path / "artifact"))
    shutil.copy(LIBRARY, folder)
    tokens = genai(folder, PROMPT, None, TOKENS, "--library", LIBRARY.name)
    assert tokens == ours(artifact, PROMPT, None, TOKENS)


@pytest.mark.parametrize("built", ["tiny_artifact", "priced_artifact"])
def test_native_kernels_in_cpp(built: str, applications: Applications, request: pytest.FixtureRequest) -> None:
    artifact = request.getfixturevalue(built)
    tokens = applications.cpp(artifact, PROMPT, None, TOKENS, "--library", LIBRARY)
    assert tokens == ours(artifact, PROMPT, None, TOKENS)


@pytest.mark.parametrize("kv", ["int8", "int4"])
@pytest.mark.parametrize("name", NAMES[1:3])
def test_caches_of_other_formats_are_refused(
    name: str, kv: str, priced_artifact: Path, applications: Applications, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(priced_artifact, tmp_path / "artifact"))
    edit_manifest(folder, lambda manifest: manifest.update(kv=kv))
    with pytest.raises(
        AssertionError, match=r"artifact.* keys and values.*build it with --kv float|Build it with --kv"
    ):
        applications.named(name)(folder, PROMPT, None, 4)


def test_cpp_refuses_a_cache_of_float16(
    tiny_model: Path, priced_calibration: Path, applications: Applications, tmp_path: Path
) -> None:
    common = ("build", tiny_model, "--calibration", priced_calibration, "--no-verify")
    run_ok(*common, "--kv", "float16", "-o", tmp_path / "artifact")
    with pytest.raises(AssertionError, match="keys and values are not float32: build it with --dtype fp32 --kv float"):
        applications.cpp(tmp_path / "artifact", PROMPT, None, 4)
