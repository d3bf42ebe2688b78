"""The runner of the fuzz test names mutations that crash, hang or fail, and improper output of a command.

No heavy package is imported here, because every crash starts another process.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.fuzz import Case, Outcome, run_all


def ends_its_process(folder: Path, random: random.Random, where: Path) -> str:
    os.kill(os.getpid(), signal.SIGSEGV)
    return ""


def never_ends(folder: Path, random: random.Random, where: Path) -> str:
    time.sleep(1000)
    return ""


def fails(folder: Path, random: random.Random, where: Path) -> str:
    raise ValueError("this one")


def is_right(folder: Path, random: random.Random, where: Path) -> str:
    return ""


def test_a_mutation_that_ends_its_process_is_named(tmp_path: Path) -> None:
    """The others still run."""
    (tmp_path / "good").mkdir()
    checks = [is_right, ends_its_process, is_right, fails, never_ends, ends_its_process, is_right, fails]
    wrong = run_all([Case(check, seed, tmp_path / "good") for seed, check in enumerate(checks)], 10.0)
    assert {case: problem.strip().rpartition("\n")[2] for case, problem in wrong.items()} == {
        "ends_its_process of good with seed 1": "ended its process with -11",
        "ends_its_process of good with seed 5": "ended its process with -11",
        "fails of good with seed 3": "ValueError: this one",
        "fails of good with seed 7": "ValueError: this one",
        "never_ends of good with seed 4": "not done after 10.0 s",
    }


@pytest.mark.parametrize(
    ("outcome", "problem"),
    [
        (Outcome(0, "text", ""), ""),
        (Outcome(1, "", "Error: a.onnx: wrong. Do this.\n"), ""),
        (Outcome(2, "", "Usage: x\n\nError: wrong. Do this.\n"), ""),
        (Outcome(1, "", "Error: the reason (Error: within). Do this.\n"), ""),
        (Outcome(1, "", "Traceback"), "not one line"),
        (Outcome(1, "", "Error: two\nlines\n"), "not one line"),
        (Outcome(1, "", "Error: two\nError: errors\n"), "not one line"),
        (Outcome(1, "", "Error: a\x1b[2J\n"), "not escaped"),
        (Outcome(1, "", "Error: " + "x" * 3000 + "\n"), "not escaped or not cut"),
        (Outcome(139, "", ""), "exit code 139"),
        (Outcome(1, "", "Error: x\n", "Traceback"), "Traceback"),
    ],
)
def test_what_a_command_may_say(outcome: Outcome, problem: str) -> None:
    assert outcome.problem.startswith(problem)
    assert bool(outcome.problem) == bool(problem)
