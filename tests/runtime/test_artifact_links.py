"""Artifacts whose files are links: inside the folder, into a hub's cache, and elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tda_export.errors import TdaError
from tda_export.evaluation.methods import Request, open_setting
from tda_export.graph import contract
from tda_export.graph.derive import counting_sessions
from tda_export.runtime import load
from tda_export.runtime.artifact import open_artifact
from tests.runtime.conftest import PROMPT


@pytest.mark.parametrize("target", [contract.DECODE_FILE, "gone", "../gone"])
def test_a_link_to_itself_or_to_nothing(artifact_copy: Path, target: str) -> None:
    (artifact_copy / contract.DECODE_FILE).unlink()
    (artifact_copy / contract.DECODE_FILE).symlink_to(target)
    with pytest.raises(TdaError, match=r"decode\.onnx: a broken link\. Copy or build"):
        open_artifact(artifact_copy)


# In a hub's cache


@pytest.fixture
def cached(tiny_artifact: Path, tmp_path: Path) -> Path:
    """The artifact as a repository in a hub's cache."""
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in tiny_artifact.iterdir():
        blob = repository / "blobs" / f"blob-of-{path.stem}-{path.suffix[1:]}"
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_an_artifact_in_a_hub_cache(cached: Path, tiny_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(cached)
    expected = tokens_of(tiny_artifact)
    assert tokens_of(cached) == expected
    assert tokens_of(tmp_path / "link") == expected


def test_graphs_derived_from_an_artifact_in_a_hub_cache(cached: Path) -> None:
    model = load(cached, provider="cpu")
    setting = open_setting(model.artifact, model.sessions, Request("griffin", sparsity=0.5))
    assert setting.sessions.prefill is not model.sessions.prefill
    counting_sessions(model.artifact, model.sessions)


@pytest.mark.parametrize("place", ["{repository}/other", "{repository}/blobs/deeper", "{cache}/models--other/blobs"])
def test_a_link_out_of_the_repository(cached: Path, place: str) -> None:
    repository = cached.parent.parent
    elsewhere = Path(place.format(repository=repository, cache=repository.parent))
    elsewhere.mkdir(parents=True)
    (cached / contract.WEIGHTS_FILE).resolve().rename(elsewhere / "weights")
    (cached / contract.WEIGHTS_FILE).unlink()
    (cached / contract.WEIGHTS_FILE).symlink_to(elsewhere / "weights")
    with pytest.raises(TdaError, match=r"weights\.bin is a link to outside the folder\. Do not use .*'cp -rL'"):
        open_artifact(cached)


def test_a_folder_beside_blobs_is_no_cache_by_that(artifact_copy: Path) -> None:
    (artifact_copy.parent / "blobs").mkdir()
    weights = artifact_copy / contract.WEIGHTS_FILE
    weights.rename(artifact_copy.parent / "blobs" / "weights")
    weights.symlink_to("../blobs/weights")
    with pytest.raises(TdaError, match=r"weights\.bin is a link to outside the folder"):
        open_artifact(artifact_copy)


def tokens_of(folder: Path) -> list[int]:
    return [token.id for token in load(folder, provider="cpu").generate(PROMPT, max_new_tokens=6)]
