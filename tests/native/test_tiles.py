"""However many threads rows are cut for, sums over them keep their bits."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tda_export.native.build import FLAGS, FOLDER, find_compiler

SOURCE = Path(__file__).with_name("tiles_of_threads.cc")


@pytest.mark.parametrize("target", ["", "-march=native"], ids=["baseline", "this-processor"])
def test_bits_do_not_depend_on_the_threads(target: str, tmp_path: Path) -> None:
    program = tmp_path / "tiles"
    options = [flag for flag in FLAGS if flag not in ("-shared", "-O3")] + ["-O2", "-w", f"-I{FOLDER}"]
    subprocess.run([*find_compiler(), *options, *target.split(), str(SOURCE), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
