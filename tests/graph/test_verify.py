"""Each check of the verification fails when it should."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from google.protobuf.message import DecodeError

from tda_export.errors import TdaError
from tda_export.files import sha256
from tda_export.graph import contract
from tda_export.graph.comparison import Check, Worst
from tda_export.graph.seal import SEAL_KEY, manifest_hash
from tda_export.graph.verify import verify_artifact
from tda_export.models.source import ModelSource, resolve_model
from tests.graph.test_parity import build_tiny
from tests.tiny import save_tiny_model

SEALED = "manifest is that of the graphs"


@pytest.fixture
def artifact(tiny_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_artifact, tmp_path / "artifact"))


@pytest.fixture(scope="module")
def source(tiny_model: Path) -> ModelSource:
    return resolve_model(str(tiny_model))


def rehash(artifact: Path) -> None:
    """Write the hashes of the files into the manifest, and the manifest's hash into the graphs."""
    path = artifact / contract.MANIFEST_FILE
    manifest = json.loads(path.read_text())
    for name, entry in manifest["files"].items():
        entry |= {"size": (artifact / name).stat().st_size, "sha256": sha256(artifact / name)}
    for name in contract.GRAPH_FILES:
        with contextlib.suppress(DecodeError):  # of graphs that a test has broken
            graph = onnx.load(artifact / name, load_external_data=False)
            onnx.helper.set_model_props(graph, {SEAL_KEY: manifest_hash(manifest)})
            (artifact / name).write_bytes(graph.SerializeToString())
        manifest["files"][name] = {"size": (artifact / name).stat().st_size, "sha256": sha256(artifact / name)}
    path.write_text(json.dumps(manifest))


def change_weight(artifact: Path, name: str, factor: float) -> None:
    """Scale one tensor of weights.bin."""
    entry = json.loads((artifact / contract.MANIFEST_FILE).read_text())["weights"][name]
    weights = np.memmap(
        artifact / contract.WEIGHTS_FILE, entry["dtype"], "r+", offset=entry["offset"], shape=tuple(entry["shape"])
    )
    weights *= factor
    weights.flush()


def failed(artifact: Path, source: ModelSource) -> set[str]:
    checks = verify_artifact(artifact, lambda name: source, provider="cpu", quiet=True)
    return {check.name for check in checks if not check.passed}


def test_altered_file_is_named(artifact: Path, source: ModelSource) -> None:
    change_weight(artifact, contract.ffn_weight(0, "gate"), 1.5)
    checks = verify_artifact(artifact, lambda name: source, provider="cpu", quiet=True)
    assert [check.problem for check in checks if not check.passed] == ["weights.bin: altered since the build"]


@pytest.mark.parametrize("factor", [1.01, math.nan])
def test_wrong_weight_fails_every_logit_check(artifact: Path, source: ModelSource, factor: float) -> None:
    change_weight(artifact, contract.ffn_weight(1, "up"), factor)
    rehash(artifact)
    assert failed(artifact, source) >= {
        "prefill logits",
        "decode with all neurons",
        "decode with the prompt's mask",
        "decode with every second neuron",
    }


def test_wrong_statistic_fails_scores_and_selection_alone(artifact: Path, source: ModelSource) -> None:
    weights = json.loads((artifact / contract.MANIFEST_FILE).read_text())["weights"][contract.down_squared_norms(1)]
    with (artifact / contract.WEIGHTS_FILE).open("r+b") as file:  # scale the first half of the neurons only
        file.seek(weights["offset"])
        half = np.frombuffer(file.read(48 * 4), np.float32) * 1.2
        file.seek(weights["offset"])
        file.write(half.astype(np.float32).tobytes())
    rehash(artifact)
    assert failed(artifact, source) == {"neuron scores", "selection of the mask"}


def test_graph_with_other_thresholds_than_the_manifest(artifact: Path, source: ModelSource) -> None:
    path = artifact / contract.MANIFEST_FILE
    manifest = json.loads(path.read_text())
    manifest["thresholds"][1] *= 1.5
    path.write_text(json.dumps(manifest))
    assert failed(artifact, source) == {SEALED}


def test_graph_with_weights_outside(artifact: Path, source: ModelSource) -> None:
    path = artifact / contract.DECODE_FILE
    (artifact / "elsewhere.bin").write_bytes((artifact / contract.WEIGHTS_FILE).read_bytes())
    model = onnx.load(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
    next(entry for entry in tensor.external_data if entry.key == "location").value = "elsewhere.bin"
    path.write_bytes(model.SerializeToString())
    rehash(artifact)
    checks = verify_artifact(artifact, lambda name: source, provider="cpu", quiet=True)
    problems = [check.problem for check in checks if not check.passed]
    assert len(problems) == 1
    assert "lies in 'elsewhere.bin' instead of weights.bin" in str(problems[0])


def test_graph_that_is_no_onnx(artifact: Path, source: ModelSource) -> None:
    (artifact / contract.PREFILL_FILE).write_bytes(b"not a protobuf")
    rehash(artifact)
    assert failed(artifact, source) == {"prefill.onnx passes onnx.checker"}


def test_another_model_is_refused(artifact: Path, tmp_path: Path) -> None:
    other = resolve_model(str(save_tiny_model("llama", tmp_path / "other", seed=1)))
    with pytest.raises(TdaError, match="was built from another model than"):
        verify_artifact(artifact, lambda name: other, provider="cpu", quiet=True)


@pytest.mark.parametrize(
    ("comparisons", "worst"),
    [
        ([(0.5, 1.0), (0.2, 0.1), (3.0, 4.0)], (0.2, 0.1)),
        ([(0.1, 0.0), (0.01, 1.0)], (0.1, 0.0)),
        ([(0.0, 0.0), (0.5, 1.0)], (0.5, 1.0)),
        ([(0.0, 1.0), (0.0, 2.0)], (0.0, 1.0)),
    ],
)
def test_worst_keeps_what_is_worst_for_its_allowance(
    comparisons: list[tuple[float, float]], worst: tuple[float, float]
) -> None:
    kept = Worst()
    for comparison in comparisons:
        kept.add(*comparison)
    assert (kept.difference, kept.allowed) == worst


@pytest.mark.parametrize(
    "bad", [(math.nan, 1.0), (math.inf, 1.0), (5.0, math.inf), (0.0, math.nan), (math.nan, math.nan)]
)
@pytest.mark.parametrize("first", [True, False])
def test_what_is_not_finite_never_passes(bad: tuple[float, float], first: bool) -> None:
    kept = Worst()
    for comparison in (bad, (0.1, 1.0)) if first else ((0.1, 1.0), bad):
        kept.add(*comparison)
    assert not Check("x", kept.difference, kept.allowed).passed


def test_wrong_tail_mean_fails_alone(tmp_path: Path, source: ModelSource) -> None:
    """The graph divides sums by their number. A scaled tail is not a mean."""
    folder = build_tiny(source, tmp_path / "artifact")
    model = ir.load(folder / contract.PREFILL_FILE)
    output = next(value for value in model.graph.outputs if value.name == contract.present_tail_mean(1))
    node = output.producer()
    twice = ir.node("Add", [node.inputs[0], node.inputs[0]])
    model.graph.insert_before(node, twice)
    node.replace_input_with(0, twice.outputs[0])
    ir.save(model, folder / contract.PREFILL_FILE)
    rehash(folder)
    assert failed(folder, source) == {"tail mean"}
