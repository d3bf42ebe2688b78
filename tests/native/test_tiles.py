"""However many threads rows are cut for, sums over them are right and keep their bits, with vectors of every size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tda_export.native.build import FLAGS, FOLDER, find_compiler

SOURCE = Path(__file__).with_name("tiles_of_threads.cc")
# What a processor has to have for code of a target, and of AVX-512 for products of bytes.
FEATURES = {
    "x86-64-v3": {"avx2", "fma", "f16c", "bmi2"},
    "x86-64-v4": {"avx512f", "avx512bw", "avx512vl", "avx512_vnni"},
}


@pytest.mark.parametrize("target", ["the compiler's own", *FEATURES])
def test_bits_do_not_depend_on_the_threads(target: str, tmp_path: Path) -> None:
    program = tmp_path / "tiles"
    options = [flag for flag in FLAGS if flag not in ("-shared", "-O3")] + ["-O2", "-w", f"-I{FOLDER}"]
    if target in FEATURES:
        cpu = Path("/proc/cpuinfo")
        if sys.platform != "linux" or not FEATURES[target] <= set(cpu.read_text().split()):
            pytest.skip(f"this processor is not known to run {target}")
        options.append(f"-march={target}")
    subprocess.run([*find_compiler(), *options, str(SOURCE), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
