"""Checks of failing commands: one clear line, and nothing left behind."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result

from tests.conftest import build_tda, run_cli
from tests.tiny import save_tiny_model

FAILURE, USAGE, INTERRUPTED = 1, 2, 130


def build(model: Path, calibration: Path, output: Path, *options: object) -> Result:
    return run_cli(*build_tda(model, calibration), "-o", output, *options)


def assert_error(result: Result, code: int, *texts: str) -> str:
    """Require one line "Error: …" with every text, the exit code `code`, and no traceback. Return the line."""
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    return assert_error_text(result.stderr, result.exit_code, code, *texts)


def assert_error_text(stderr: str, exit_code: int, code: int, *texts: str) -> str:
    assert "Traceback" not in stderr
    assert exit_code == code, stderr
    before, _, message = stderr.rpartition("Error: ")
    assert "Error: " not in before
    assert message.count("\n") == 1, message  # exactly one line, with its end
    for text in texts:
        assert text in message
    return message


def listing(folder: Path) -> dict[str, bytes | None]:
    """Return all paths below a folder, with the content of files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def outputs(tmp_path: Path) -> Iterator[Path]:
    """A folder for outputs. A failing command must leave nothing new in it."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    yield folder
    assert listing(folder) == {}


@pytest.fixture
def model_copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def artifact_copy(tiny_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_artifact, tmp_path / "artifact"))


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same architecture with other weights."""
    return save_tiny_model("llama", tmp_path_factory.mktemp("models") / "other", seed=1)
