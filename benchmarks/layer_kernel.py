"""Time a chain of products of one token as launches of RowLinear4 and as one kernel whose blocks stay throughout.

The one kernel was slower (docs/results.md) and is not in the product; this is how that was measured.

    python benchmarks/layer_kernel.py [--layers 8] [--density 1 0.7 0.5] [--stamps] [--out DIR] [--compile PROGRAM]

A layer has the four products of LLaMA-3-8B's: int4 in groups of 32, float16, and neither attention nor norms in either
way. It compiles device/row_linear.cu and layer_kernel.cu with nvcc for GPUs of compute capability 9.0 and runs the
program on the GPU of this machine; with `--compile` it leaves the program there instead. Results are compared before
anything is timed: those of small products with a slow reference, those of the layers between the two ways. It prints a
line of JSON for each case, and with `--out` also leaves them in DIR/layer_kernel.jsonl. `early` counts the matrices of
16 rows that a warp reads before it knows x; `gathered` says after which products one block adds up what others have
left (layer_kernel.cuh).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from device_rows import cases_of, device_code

SOURCE = Path(__file__).with_suffix(".cu")
# Kernels of RowLinear that are not launched only cost time to compile.
OTHER_KERNELS = re.compile(r"^TDA_ROW_LINEAR\(.*\n", re.MULTILINE)
BY_MATRICES = ("1_small_8_3", "1_large_16_1")


def compile_program(folder: Path, program: Path, more: tuple[str, ...] = ()) -> None:
    source = folder / "row_linear.cuh"
    source.write_text(OTHER_KERNELS.sub("", device_code(stamps=False)), encoding="utf-8")
    (folder / "cases.h").write_text(f"#define KERNELS {cases_of(4, BY_MATRICES)}\n", encoding="utf-8")
    defines = ["TDA_BF16=0", "TDA_BITS=4", "TDA_CLUSTERS=1", "TDA_INPUTS=0", f'DEVICE_SOURCE="{source}"']
    options = ["-O3", "-std=c++17", "-arch=sm_90", "--disable-warnings", "-include", str(folder / "cases.h"), *more]
    subprocess.run(["nvcc", *options, *(f"-D{each}" for each in defines), str(SOURCE), "-o", str(program)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--density", nargs="+", default=["1", "0.7", "0.5"])
    parser.add_argument("--stamps", action="store_true", help="also how long blocks take from step to step")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also leave the lines in a file here")
    parser.add_argument("--compile", type=Path, metavar="PROGRAM", help="only compile, to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = options.compile or Path(folder) / "layer_kernel"
        compile_program(Path(folder), program)
        if options.compile is not None:
            return
        stamps = ["--stamps"] if options.stamps else []
        command = [str(program), *stamps, "--layers", str(options.layers), *options.density]
        lines = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                lines.append(line)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "layer_kernel.jsonl").write_text("".join(lines), encoding="utf-8")
    sys.exit(process.returncode)


if __name__ == "__main__":
    main()
