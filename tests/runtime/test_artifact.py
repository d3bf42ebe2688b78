"""Open artifacts: good ones, damaged ones, and hostile ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tda_export.errors import TdaError
from tda_export.graph import contract
from tda_export.graph.contract import ModelShape
from tda_export.runtime.artifact import NEEDED_FILES, is_artifact, open_artifact
from tests.runtime.conftest import edit_manifest


def test_good_artifact(tiny_artifact: Path, tiny_model: Path) -> None:
    artifact = open_artifact(tiny_artifact)
    assert artifact.name == str(tiny_model)
    assert artifact.eos_token_ids == {2}
    assert (artifact.shape.num_layers, artifact.shape.hidden_size, artifact.shape.ffn_size) == (3, 64, 96)
    assert artifact.dense_ffn_bytes == 3 * 3 * 96 * 64 * 4
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
    with pytest.raises(TdaError, match=r"there is no manifest.json.*'tda-export build'"):
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
    with pytest.raises(
        TdaError, match=rf"format {version} is newer than this tda-export \({contract.FORMAT_VERSION}\). Update it"
    ):
        open_artifact(artifact_copy)


def test_older_format(artifact_copy: Path) -> None:
    edit_manifest(artifact_copy, lambda manifest: manifest.update(format_version=3))
    with pytest.raises(
        TdaError,
        match=rf"format 3 is older than this tda-export's \({contract.FORMAT_VERSION}\). Build the artifact again",
    ):
        open_artifact(artifact_copy)


@pytest.mark.parametrize("version", [None, "1", 1.0, []], ids=str)
def test_no_format_version(artifact_copy: Path, version: object) -> None:
    edit_manifest(
        artifact_copy,
        lambda manifest: manifest.pop("format_version") if version is None else manifest.update(format_version=version),
    )
    with pytest.raises(TdaError, match=r"manifest.json: no format version. Build the artifact again"):
        open_artifact(artifact_copy)


@pytest.mark.parametrize("key", ["files", "shape", "model", "method", "weights", "graph_weights"])
def test_incomplete_manifest(artifact_copy: Path, key: str) -> None:
    """Every entry that the runtime or verify reads later is required here, with one clear line."""
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


@pytest.mark.parametrize("name", [field.name for field in fields(ModelShape) if field.name not in ("dtype", "kv")])
@pytest.mark.parametrize("value", [0, -1, 1.5, 64.0, "64", True, None, [64]], ids=str)
def test_malformed_shape(artifact_copy: Path, name: str, value: object) -> None:
    edit_manifest(artifact_copy, lambda manifest: manifest["shape"].update({name: value}))
    with pytest.raises(TdaError, match=rf"incomplete manifest \(shape\.{name}\)"):
        open_artifact(artifact_copy)


@pytest.mark.parametrize("value", ["float64", "int8", "", None, 4], ids=str)
def test_unknown_dtype(artifact_copy: Path, value: object) -> None:
    edit_manifest(artifact_copy, lambda manifest: manifest["shape"].update(dtype=value))
    with pytest.raises(TdaError, match=r"incomplete manifest \(shape\.dtype\)"):
        open_artifact(artifact_copy)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("eos_token_ids", value) for value in (2, None, "2", ["2"], [2.0], [True], {"2": 2}, [[2]])),
        *(("ffn_matrices", value) for value in (None, "3", 3.0, True)),
        *((key, value) for key in ("name", "fingerprint") for value in (None, 5, ["x"])),
    ],
    ids=str,
)
def test_malformed_model(artifact_copy: Path, key: str, value: object) -> None:
    edit_manifest(artifact_copy, lambda manifest: manifest["model"].update({key: value}))
    with pytest.raises(TdaError, match=rf"incomplete manifest \(.*model\.{key}.*Build the artifact again"):
        open_artifact(artifact_copy)


@pytest.mark.parametrize("eos", [[], [2, 0]], ids=str)
def test_any_number_of_end_tokens(artifact_copy: Path, eos: list[int]) -> None:
    edit_manifest(artifact_copy, lambda manifest: manifest["model"].update(eos_token_ids=eos))
    assert open_artifact(artifact_copy).eos_token_ids == set(eos)


@pytest.mark.parametrize("key", ["statistic", "selection"])
def test_incomplete_method(artifact_copy: Path, key: str) -> None:
    edit_manifest(artifact_copy, lambda manifest: manifest["method"].pop(key))
    with pytest.raises(TdaError, match=rf"incomplete manifest \(.*method\.{key}"):
        open_artifact(artifact_copy)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda manifest: manifest.pop("thresholds"), "thresholds"),
        (lambda manifest: manifest.update(thresholds=[0.1]), "thresholds"),
        (lambda manifest: manifest.update(thresholds=[0.1, float("nan"), 0.1]), "thresholds"),
        (lambda manifest: manifest.update(thresholds=["a", "a", "a"]), "thresholds"),
        (lambda manifest: manifest["files"]["tokenizer.json"].pop("sha256"), "sha256"),
        (lambda manifest: manifest["files"]["tokenizer.json"].update(sha256=5), r"files\.tokenizer\.json\.sha256"),
        *(
            (lambda manifest, key=key, value=value: manifest.update({key: value}), key)
            for key in ("token_thresholds", "survivors")
            for value in ([0.1], [0.1, float("inf"), 0.1])
        ),
        *((lambda manifest, key=key: manifest.pop(key), key) for key in ("token_thresholds", "survivors", "refresh")),
        (lambda manifest: manifest.update(refresh={"tokens": 1}), "A refresh after every 1 tokens"),
        (lambda manifest: manifest.update(refresh={"colour": 1}), "colour"),
        (lambda manifest: manifest["method"].update(selection="topk"), r"method\.density"),
        (lambda manifest: manifest["shape"].update(ffn_size=200), r"matrices\.layers\.0\.ffn\.down"),
        (lambda manifest: manifest["shape"].update(num_layers=4), r"matrices\.layers\.3\.ffn\.down"),
        (lambda manifest: manifest["shape"].update(num_layers=2), r"(thresholds|shape\.num_layers)"),
        (lambda manifest: manifest["shape"].update(vocab_size=10), r"shape\.vocab_size"),
        (lambda manifest: manifest["shape"].update(dtype="int32"), r"shape\.dtype"),
    ],
)
def test_manifest_that_does_not_fit_itself(
    artifact_copy: Path, change: Callable[[dict[str, Any]], object], what: str
) -> None:
    edit_manifest(artifact_copy, change)
    with pytest.raises(TdaError, match=rf"incomplete manifest \(.*{what}.*Build the artifact again"):
        open_artifact(artifact_copy)


def test_manifest_nested_too_deeply(artifact_copy: Path) -> None:
    (artifact_copy / contract.MANIFEST_FILE).write_text("[" * 100_000)
    with pytest.raises(TdaError, match=r"manifest\.json: not readable"):
        open_artifact(artifact_copy)
    assert not is_artifact(artifact_copy)


def test_folder_in_place_of_a_file_is_not_ours(artifact_copy: Path) -> None:
    (artifact_copy / contract.WEIGHTS_FILE).unlink()
    (artifact_copy / contract.WEIGHTS_FILE).mkdir()
    assert not is_artifact(artifact_copy)


def size_of_weights(manifest: dict[str, Any]) -> int:
    return int(manifest["files"][contract.WEIGHTS_FILE]["size"])


@pytest.mark.parametrize(
    "change",
    [
        lambda entry, size: entry.update(offset=-4),
        lambda entry, size: entry.update(offset=size),
        lambda entry, size: entry.update(offset=size - 4 * math.prod(entry["shape"]) + 4),
        lambda entry, size: entry.update(offset="0"),
        lambda entry, size: entry.update(shape=[size]),
        lambda entry, size: entry.update(shape=[1 << 62, 1 << 62]),
        lambda entry, size: entry.update(shape=None),
        lambda entry, size: entry.update(shape=["64"]),
        lambda entry, size: entry.update(dtype="object"),
        lambda entry, size: entry.update(dtype=None),
        lambda entry, size: entry.pop("offset"),
        lambda entry, size: entry.pop("shape"),
        lambda entry, size: entry.pop("dtype"),
    ],
)
def test_weight_outside_its_file(artifact_copy: Path, change: Callable[[dict[str, Any], int], object]) -> None:
    """Programs that map weights.bin into memory rely on this check."""
    edit_manifest(
        artifact_copy, lambda manifest: change(manifest["weights"][contract.EMBEDDING], size_of_weights(manifest))
    )
    with pytest.raises(TdaError, match="incomplete manifest"):
        open_artifact(artifact_copy)


def test_weight_at_the_very_end_of_its_file(artifact_copy: Path) -> None:
    def move(manifest: dict[str, Any]) -> None:
        entry = manifest["weights"][contract.EMBEDDING]
        entry["offset"] = size_of_weights(manifest) - 4 * math.prod(entry["shape"])

    edit_manifest(artifact_copy, move)
    open_artifact(artifact_copy)


@pytest.mark.parametrize("file", [contract.PREFILL_FILE, contract.DECODE_FILE])
@pytest.mark.parametrize(
    "change",
    [
        lambda weights, file: weights[file].append("nonesuch"),
        lambda weights, file: weights.pop(file),
        lambda weights, file: weights.update({file: 5}),
        lambda weights, file: weights.update({file: [["embedding"]]}),
    ],
    ids=["unknown weight", "no list", "a number", "a list of lists"],
)
def test_malformed_graph_weights(artifact_copy: Path, file: str, change: Callable[[Any, str], object]) -> None:
    edit_manifest(artifact_copy, lambda manifest: change(manifest["graph_weights"], file))
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
    with pytest.raises(TdaError, match=r"weights.bin is a link to outside the folder. Do not use"):
        open_artifact(artifact_copy)


def test_an_artifact_is_one(artifact_copy: Path, tmp_path: Path) -> None:
    assert is_artifact(artifact_copy)
    (tmp_path / "link").symlink_to(artifact_copy)
    assert is_artifact(tmp_path / "link")


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(format_version=99),
        lambda manifest: manifest.pop("format_version"),
        lambda manifest: manifest.pop("shape"),
        lambda manifest: manifest["files"][contract.WEIGHTS_FILE].update(size=1),
    ],
    ids=["newer", "no version", "incomplete", "damaged"],
)
def test_an_artifact_of_any_state_is_one(artifact_copy: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """An artifact that cannot be opened may be replaced, because that is the purpose of a new build."""
    edit_manifest(artifact_copy, change)
    assert is_artifact(artifact_copy)
    (artifact_copy / contract.WEIGHTS_FILE).unlink()
    assert is_artifact(artifact_copy)


@pytest.mark.parametrize("name", ["notes.txt", ".git", "weights.bin.bak"])
@pytest.mark.parametrize("make", [Path.touch, Path.mkdir], ids=["file", "folder"])
def test_a_folder_that_holds_more_is_none(artifact_copy: Path, name: str, make: Callable[[Path], None]) -> None:
    make(artifact_copy / name)
    assert not is_artifact(artifact_copy)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "null", "5", "{}", '{"format": "tda-export"}', '{"format": "gguf", "files": {}}', '{"files": {}}'],
)
def test_a_foreign_manifest_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / contract.MANIFEST_FILE).write_text(content)
    assert not is_artifact(tmp_path)


@pytest.mark.parametrize("make", [lambda path: None, Path.touch], ids=["missing", "file"])
def test_what_is_no_artifact_at_all(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x")
    assert not is_artifact(tmp_path / "x")


def test_an_empty_folder_may_become_one(tmp_path: Path) -> None:
    assert is_artifact(tmp_path)
