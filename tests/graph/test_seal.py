"""An altered manifest does not pass verification, whichever value was altered."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from tda_export.files import sha256
from tda_export.graph import contract
from tda_export.graph.seal import SEAL_KEY, manifest_hash
from tda_export.graph.verify import verify_artifact
from tests.cli.conftest import FAILURE, assert_error
from tests.conftest import run_cli, run_ok
from tests.runtime.conftest import edit_manifest

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def artifact(tiny_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_artifact, tmp_path / "artifact"))


def problems(artifact: Path) -> list[str]:
    checks = verify_artifact(artifact, None, provider="cpu", quiet=True)
    return [str(check.problem) for check in checks if not check.passed]


def leaves(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Return the places of all plain values in a manifest."""
    if isinstance(content, dict | list) and content:
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from leaves(value, (*place, key))
    else:
        yield place


def altered(value: Any) -> Any:
    """Return a near value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return value * 0.999 + 1e-6
    if isinstance(value, int):
        return value + 1
    return f"{value}x" if isinstance(value, str) else "something"


def test_every_value_of_the_manifest_changes_its_hash(tiny_artifact: Path) -> None:
    text = (tiny_artifact / contract.MANIFEST_FILE).read_text()
    manifest = json.loads(text)
    whole, count = manifest_hash(manifest), 0
    for place in leaves(manifest):
        if place[0] == "files" and place[1] in contract.GRAPH_FILES:
            continue  # these hashes depend on this one
        changed = json.loads(text)
        holder = changed
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = altered(holder[place[-1]])
        assert manifest_hash(changed) != whole, place
        count += 1
    assert count > 500


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda manifest: manifest["refresh"].update(tokens=4), "altered since the build"),
        (lambda manifest: manifest["refresh"].update(decay=0.5), "altered since the build"),
        (lambda manifest: manifest["model"].update(eos_token_ids=[5]), "altered since the build"),
        (lambda manifest: manifest["model"].update(eos_token_ids=[]), "altered since the build"),
        (lambda manifest: manifest["model"].update(name="other"), "altered since the build"),
        (lambda manifest: manifest.update(survivors=[0.5] * 3), "altered since the build"),
        (lambda manifest: manifest["expected"].update(sparsity=0.9), "altered since the build"),
        (lambda manifest: manifest["method"].update(tail="zero"), "altered since the build"),
        (lambda manifest: manifest["shape"].update(max_positions=100), "altered since the build"),
        (lambda manifest: manifest["files"].pop("chat_template.jinja"), "altered since the build"),
        (lambda manifest: manifest["files"].pop("tokenizer_config.json"), "altered since the build"),
        (lambda manifest: manifest["spec"].update(norm_epsilon=0.1), "altered since the build"),
        (lambda manifest: manifest.update(colour="red"), "altered since the build"),
        (lambda manifest: manifest.update(prior_tokens=8.0), "prior_tokens is not what prefill.onnx has by default"),
        *(
            (lambda manifest, name=name: manifest.update({name: [value * 1.5 for value in manifest[name]]}), problem)
            for name, problem in (
                ("thresholds", "thresholds is not what prefill.onnx has by default"),
                ("token_thresholds", "token_thresholds is not what decode.onnx has by default"),
            )
        ),
    ],
)
def test_altered_manifest(artifact: Path, change: Change, problem: str) -> None:
    assert not problems(artifact)
    edit_manifest(artifact, change)
    assert [found for found in problems(artifact) if found.startswith(problem)]
    error = assert_error(run_cli("verify", artifact, "--files-only"), FAILURE, "checks failed")
    assert "manifest is that of the graphs" in error


def test_a_manifest_written_otherwise_is_the_same(artifact: Path) -> None:
    path = artifact / contract.MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    assert not problems(artifact)


@pytest.mark.parametrize("name", contract.GRAPH_FILES)
@pytest.mark.parametrize("seal", [None, "0" * 64])
def test_a_graph_of_another_manifest(artifact: Path, name: str, seal: str | None) -> None:
    graph = onnx.load(artifact / name, load_external_data=False)
    onnx.helper.set_model_props(graph, {} if seal is None else {SEAL_KEY: seal})
    (artifact / name).write_bytes(graph.SerializeToString())
    entry = {"size": (artifact / name).stat().st_size, "sha256": sha256(artifact / name)}
    edit_manifest(artifact, lambda manifest: manifest["files"].update({name: entry}))
    assert problems(artifact) == [
        f"{name} does not say which manifest it belongs to"
        if seal is None
        else f"altered since the build: {name} belongs to a manifest of SHA-256 {seal}"
    ]


def test_griffin_is_sealed_too(tiny_model: Path, tmp_path: Path) -> None:
    run_ok("build", tiny_model, "--method", "griffin", "--sparsity", 0.5, "--no-verify", "-o", tmp_path / "artifact")
    assert not problems(tmp_path / "artifact")
    edit_manifest(tmp_path / "artifact", lambda manifest: manifest["method"].update(density=0.4))
    assert problems(tmp_path / "artifact")
