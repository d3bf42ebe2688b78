"""The plugin that lets slow machines run the property tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = """
import time
from hypothesis import given, settings
from hypothesis import strategies as st

drawn = {"fifty": 0, "two": 0}


@settings(max_examples=50, deadline=1)
@given(st.integers())
def test_fifty(number: int) -> None:
    drawn["fifty"] += 1
    time.sleep(0.01)  # longer than the deadline


@settings(max_examples=2)
@given(st.integers())
def test_two(number: int) -> None:
    drawn["two"] += 1


def test_how_many() -> None:
    assert drawn == {"fifty": 3, "two": 2}
"""


def test_property_tests_draw_no_more_examples_and_have_no_deadline(tmp_path: Path) -> None:
    """Tests that ask for fewer keep their number."""
    (tmp_path / "test_drawn.py").write_text(TESTS)
    options = ["-p", "tests.fewer_examples", "--examples", "3", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path / "test_drawn.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "3 passed" in done.stdout, done.stdout + done.stderr
