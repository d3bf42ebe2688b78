"""Threads of a team take every task once, and share memory as C++ allows."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tda_export.native.build import FOLDER, find_compiler

SOURCE = Path(__file__).with_name("team_under_load.cc")


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="compilers elsewhere may have no sanitizers"
)
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_sanitizers_find_nothing(sanitizer: str, tmp_path: Path) -> None:
    program = tmp_path / "team"
    options = ["-std=c++17", "-O1", "-g", f"-fsanitize={sanitizer}", "-pthread", f"-I{FOLDER}"]
    subprocess.run([*find_compiler(), *options, str(SOURCE), str(FOLDER / "team.cc"), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
