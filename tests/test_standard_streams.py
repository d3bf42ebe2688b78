"""Commands whose standard streams are closed, full or of the wrong kind, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import FAILURE, USAGE, assert_error_text
from tests.conftest import build_tda, run_ok

if sys.platform == "win32":
    pytest.skip("a POSIX shell", allow_module_level=True)

FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


def shell(redirection: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `tda-export` from a shell, which closes or redirects its streams."""
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-m", "tda_export", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    environment.pop("PYTHONUNBUFFERED", None)  # what a stream holds matters as well
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def test_closed_input_is_empty_input(tiny_artifact: Path) -> None:
    done = shell("<&-", "chat", tiny_artifact)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for prompt in ([], ["-"]):
        done = shell("<&-", "generate", tiny_artifact, *prompt)
        assert_error_text(done.stderr, done.returncode, FAILURE, "The prompt is empty")


def test_closed_output_and_error(tiny_artifact: Path) -> None:
    arguments = ("generate", tiny_artifact, "Hi", "--max-new-tokens", 3)
    as_usual = run_ok(*arguments)
    done = shell(">&-", *arguments)
    assert (done.returncode, done.stdout) == (0, "")
    assert "3 new" in done.stderr
    done = shell("2>&-", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (0, as_usual.stdout, "")
    assert shell("<&- >&- 2>&-", *arguments).returncode == 0
    assert shell("<&- >&- 2>&-", "generate", "nowhere", "Hi").returncode == FAILURE
    assert shell("<&- >&- 2>&-", "generate", "--no-such-option").returncode == USAGE


def test_no_output_file_takes_the_number_of_a_closed_stream(
    tiny_model: Path, tiny_calibration: Path, tiny_artifact: Path, tmp_path: Path
) -> None:
    """Otherwise the output of libraries would go into the weights."""
    done = shell("<&- >&- 2>&-", *build_tda(tiny_model, tiny_calibration), "-o", tmp_path / "a")
    assert done.returncode == 0
    for path in tiny_artifact.iterdir():
        assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes(), path.name


@FULL
@pytest.mark.parametrize("arguments", [["inspect"], ["generate", "Hi"], ["verify", "--files-only"], ["--help"]])
def test_full_output(tiny_artifact: Path, arguments: list[str]) -> None:
    artifact = [] if arguments == ["--help"] else [tiny_artifact]
    done = shell("> /dev/full", arguments[0], *artifact, *arguments[1:])
    assert_error_text(done.stderr, done.returncode, FAILURE, "Input or output: No space left on device.")


@FULL
def test_full_error(tiny_artifact: Path) -> None:
    """Only the exit code can report the failure."""
    done = shell("2> /dev/full", "generate", "nowhere", "Hi")
    assert (done.returncode, done.stdout, done.stderr) == (FAILURE, "", "")


def test_output_that_is_for_reading(tiny_artifact: Path) -> None:
    done = shell("1< /dev/null", "inspect", tiny_artifact)
    assert_error_text(done.stderr, done.returncode, FAILURE, "Input or output: Bad file descriptor.")


@pytest.mark.parametrize("arguments", [["inspect"], ["--help"]])
def test_a_reader_that_leaves(tiny_artifact: Path, arguments: list[str]) -> None:
    artifact = [] if arguments == ["--help"] else [tiny_artifact]
    done = shell("| true", arguments[0], *artifact)
    assert done.stderr == ""
