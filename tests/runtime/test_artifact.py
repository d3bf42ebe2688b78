"""Opening artifacts: good ones, damaged ones, hostile ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tda_export.errors import TdaError
from tda_export.graph import contract
from tda_export.runtime.artifact import NEEDED_FILES, open_artifact
from tests.runtime.conftest import edit_manifest


def test_good_artifact(tiny_artifact: Path, tiny_model: Path) -> None:
    artifact = open_artifact(tiny_artifact)
    assert artifact.name == str(tiny_model)
    assert artifact.eos_token_ids == {2}
    assert (artifact.shape.num_layers, artifact.shape.hidden_size, artifact.shape.ffn_size) == (3, 64, 96)
    assert artifact.bytes_per_neuron == 3 * 64 * 4
    assert artifact.file("x") == tiny_artifact / "x"


def test_artifact_through_a_link(tiny_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tiny_artifact)
    assert open_artifact(tmp_path / "link").shape == open_artifact(tiny_artifact).shape


def test_link_inside_the_folder(artifact_copy: Path) -> None:
    weights = artifact_copy / contract.WEIGHTS_FILE
    weights.rename(artifact_copy / "weights.1.bin")
    weights.symlink_to("weights.1.bin")
    open_artifact(artifact_copy)


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, Path.touch], ids=["missing", "empty folder", "file"])
def test_no_artifact(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x")
    with pytest.raises(TdaError, match=r"no manifest.json there.*'tda-export build'"):
        open_artifact(tmp_path / "x")


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe"], ids=["not JSON", "empty", "not UTF-8"])
def test_unreadable_manifest(artifact_copy: Path, content: bytes) -> None:
    (artifact_copy / contract.MANIFEST_FILE).write_bytes(content)
    with pytest.raises(TdaError, match=r"manifest.json: not readable"):
        open_artifact(artifact_copy)


@pytest.mark.parametrize("content", [[], 1, None, {}, {"format": "gguf"}], ids=str)
def test_foreign_manifest(artifact_copy: Path, content: object) -> None:
    (artifact_copy / contract.MANIFEST_FILE).write_text(json.dumps(content))
    with pytest.raises(TdaError, match="not a manifest of tda-export"):
        open_artifact(artifact_copy)


@pytest.mark.parametrize("version", [contract.FORMAT_VERSION + 1, 99])
def test_newer_format(artifact_copy: Path, version: int) -> None:
    edit_manifest(artifact_copy, lambda manifest: manifest.update(format_version=version))
    with pytest.raises(TdaError, match=rf"format {version} is newer than this tda-export \(1\). Update it"):
        open_artifact(artifact_copy)


@pytest.mark.parametrize("key", ["files", "shape", "model", "method", "weights", "graph_weights"])
def test_incomplete_manifest(artifact_copy: Path, key: str) -> None:
    """Whatever the runtime or verify reads later must be missed here, where it is one clear line."""
    edit_manifest(artifact_copy, lambda manifest: manifest.pop(key))
    with pytest.raises(TdaError, match=rf"incomplete manifest.*{key}.*Build the artifact again"):
        open_artifact(artifact_copy)


@pytest.mark.parametrize("key", ["name", "fingerprint", "eos_token_ids", "ffn_matrices"])
def test_incomplete_model(artifact_copy: Path, key: str) -> None:
    edit_manifest(artifact_copy, lambda manifest: manifest["model"].pop(key))
    with pytest.raises(TdaError, match=rf"incomplete manifest.*{key}"):
        open_artifact(artifact_copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(files=list(manifest["files"])),
        lambda manifest: manifest["files"][contract.WEIGHTS_FILE].pop("size"),
        lambda manifest: manifest["files"].update({contract.WEIGHTS_FILE: 5}),
        lambda manifest: manifest["shape"].pop("head_size"),
        lambda manifest: manifest["shape"].update(colour=1),
        lambda manifest: manifest.update(shape=None),
    ],
    ids=["file list", "no size", "a number for a file", "no head_size", "unknown size", "no shape"],
)
def test_malformed_manifest(artifact_copy: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_manifest(artifact_copy, change)
    with pytest.raises(TdaError, match="incomplete manifest"):
        open_artifact(artifact_copy)


@pytest.mark.parametrize("name", [*NEEDED_FILES, contract.CALIBRATION_FILE])
def test_missing_file(artifact_copy: Path, name: str) -> None:
    (artifact_copy / name).unlink()
    with pytest.raises(TdaError, match=f"{name} is missing. Build the artifact again"):
        open_artifact(artifact_copy)


@pytest.mark.parametrize("name", NEEDED_FILES)
def test_unlisted_file(artifact_copy: Path, name: str) -> None:
    edit_manifest(artifact_copy, lambda manifest: manifest["files"].pop(name))
    with pytest.raises(TdaError, match=f"the manifest does not list {name}"):
        open_artifact(artifact_copy)


@pytest.mark.parametrize("change", [-1, 1])
def test_file_of_another_size(artifact_copy: Path, change: int) -> None:
    path = artifact_copy / contract.WEIGHTS_FILE
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size + change)
    with pytest.raises(TdaError, match=f"weights.bin: {size + change} bytes, and the manifest says {size}: truncated"):
        open_artifact(artifact_copy)


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "a/b", "a\\b", "..\\x", "..", ".", "", "C:x", "./../x"])
def test_file_outside_the_folder(artifact_copy: Path, name: str) -> None:
    (artifact_copy.parent / "x").write_text("secret")
    edit_manifest(artifact_copy, lambda manifest: manifest["files"].update({name: {"size": 6, "sha256": ""}}))
    with pytest.raises(TdaError, match=r"which is not a file of this folder. Do not use this artifact"):
        open_artifact(artifact_copy)


def test_link_out_of_the_folder(artifact_copy: Path) -> None:
    weights = artifact_copy / contract.WEIGHTS_FILE
    weights.rename(artifact_copy.parent / "elsewhere.bin")
    weights.symlink_to("../elsewhere.bin")
    with pytest.raises(TdaError, match=r"weights.bin is a link out of the folder. Do not use"):
        open_artifact(artifact_copy)
