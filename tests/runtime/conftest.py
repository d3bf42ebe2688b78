"""The tiny artifact, loaded, beside the model that it was built from."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tda_export.graph import contract
from tda_export.models.source import ModelSource, resolve_model
from tda_export.native.library import SWITCH, native_problem
from tda_export.runtime import Model, load

PROMPT = "The sea is calm tonight"


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change an artifact's manifest in place."""
    path = folder / contract.MANIFEST_FILE
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


@contextlib.contextmanager
def without_native_kernels() -> Iterator[None]:
    """Run as where the library was not built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "0")
        native_problem.cache_clear()
        yield
    native_problem.cache_clear()


@pytest.fixture(scope="session", params=["native", "stock"])
def model(tiny_artifact: Path, request: pytest.FixtureRequest) -> Model:
    """The tiny artifact on the CPU. A Model keeps nothing of a generation, so tests may share it."""
    with without_native_kernels() if request.param == "stock" else contextlib.nullcontext():
        loaded = load(tiny_artifact, provider="cpu")
    assert loaded.sessions.native == (request.param == "native")
    return loaded


@pytest.fixture(scope="session")
def source(tiny_model: Path) -> ModelSource:
    """The model that it was built from."""
    return resolve_model(str(tiny_model))


@pytest.fixture(scope="session")
def reference(source: ModelSource) -> Any:
    """The same in transformers."""
    return source.reference()


@pytest.fixture
def artifact_copy(tiny_artifact: Path, tmp_path: Path) -> Path:
    """A copy of the tiny artifact, to be damaged."""
    return Path(shutil.copytree(tiny_artifact, tmp_path / "artifact"))
