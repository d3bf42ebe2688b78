"""Kill a command at any moment: the next run gives the result of an undisturbed one, and leaves nothing else."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import listing
from tests.conftest import CALIBRATE_TINY, QUANTIZE_TINY, build_tda

if not hasattr(os, "fork"):
    pytest.skip("forks", allow_module_level=True)

pytestmark = pytest.mark.long

KILLS = 20
AT_ONCE = 4  # kills before each run to the end


class Forks:
    """Runs commands in forks of one warm process (tests/cli/forking.py)."""

    def __init__(self, folder: Path, *first: tuple[object, ...]) -> None:
        environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.cli.forking"]
        command += [json.dumps([str(argument) for argument in arguments]) for arguments in first]
        self.errors, pipe = folder / "errors", subprocess.PIPE
        with self.errors.open("w") as file:
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=file, text=True, env=environment)
        assert self._line() == "ready", self.errors.read_text()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def run(self, arguments: tuple[object, ...], kill_after: float | None = None) -> int:
        """Run a command, kill it after some seconds if it still runs, and return its exit code."""
        assert self.process.stdin is not None
        request = [[str(argument) for argument in arguments], kill_after]
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return int(self._line())

    def succeed(self, arguments: tuple[object, ...]) -> float:
        """Run a command to its end, require success, and return the seconds."""
        start = time.monotonic()
        assert self.run(arguments) == 0, self.errors.read_text()
        return time.monotonic() - start

    def kill(self, arguments: tuple[object, ...], moment: float) -> None:
        """Run a command and kill it at that moment, or at an earlier one if it ends too soon."""
        while (code := self.run(arguments, kill_after=moment)) != -signal.SIGKILL:
            assert code == 0, self.errors.read_text()
            moment *= 0.7


@pytest.fixture(scope="module")
def forks(tiny_model: Path, tiny_calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    folder = tmp_path_factory.mktemp("forks")
    calibrate = ("calibrate", tiny_model, *CALIBRATE_TINY, "-o", folder / "c")
    build = (
        *build_tda(tiny_model, tiny_calibration),
        "--no-verify",
        "-o",
        folder / "a",
    )
    forks = Forks(folder, calibrate, build, ("quantize", tiny_model, *QUANTIZE_TINY, "-o", folder / "q"))
    yield forks
    forks.process.communicate(timeout=60)
    assert forks.process.returncode == 0


@pytest.mark.parametrize("command", ["build", "calibrate", "quantize"])
def test_killed_at_any_moment(
    command: str, forks: Forks, tiny_model: Path, tiny_calibration: Path, tmp_path: Path
) -> None:
    build = ("--method", "tda", "--calibration", tiny_calibration)
    options = {"build": build, "calibrate": CALIBRATE_TINY, "quantize": QUANTIZE_TINY}[command]

    def writing_to(folder: str, *more: str) -> tuple[object, ...]:
        return (command, tiny_model, *options, *more, "-o", tmp_path / folder / "x")

    for folder in ("undisturbed", "killed"):
        (tmp_path / folder).mkdir()
    forks.succeed(writing_to("undisturbed"))
    seconds = forks.succeed(writing_to("undisturbed", "--overwrite"))  # the first one warms files up
    expected = listing(tmp_path / "undisturbed")
    moments = random.Random(command)
    for number in range(KILLS):
        share = (number + moments.random()) / KILLS
        forks.kill(writing_to("killed", "--overwrite"), share * seconds)
        if number % AT_ONCE == AT_ONCE - 1:
            forks.succeed(writing_to("killed", "--overwrite"))
            assert listing(tmp_path / "killed") == expected
