"""Time layers of one token without ONNX Runtime, with attention in clusters of each size.

    python benchmarks/device_layer.py [--heads 32] [--kv-heads 32] [--ffn 11008] [--layers 16] [--context 1150]
        [--density 1 0.5] [--without-whole] [--compile PROGRAM]

A layer is queries, keys and values, attention, output projection, gate and up, and down: int4 in groups of 32, float16,
heads of 128 elements, and no norms. How long attention takes depends on the kernel before it, whose blocks must end
before a cluster finds room, so it is timed within layers. It compiles device/row_linear.cu, device/attention.cu and
device_layer.cu with nvcc for GPUs of compute capability 9.0 and runs the program on the GPU of this machine; with
`--compile` it leaves the program there instead. `--without-whole` leaves out the kernel of products by blocks that
stay, which the product takes where it pays. Attention is compared with a slow reference before it is timed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

from device_rows import WHOLE, cases_of, device_code
from layer_kernel import BY_MATRICES, OTHER_KERNELS

from tda_export.native.build import device_sources

SOURCE = Path(__file__).with_suffix(".cu")


def compile_program(folder: Path, program: Path, heads_at_once: int, kernels: Collection[str]) -> None:
    rows, attention = folder / "row_linear.cuh", folder / "attention.cuh"
    rows.write_text(OTHER_KERNELS.sub("", device_code(stamps=False)), encoding="utf-8")
    attention.write_text(device_sources()["attention"], encoding="utf-8")
    (folder / "cases.h").write_text(f"#define KERNELS {cases_of(4, kernels)}\n", encoding="utf-8")
    defines = ["TDA_BF16=0", "TDA_BITS=4", "TDA_KV_CODES=0", "TDA_CLUSTERS=1", "TDA_INPUTS=0"]
    defines += [f"TDA_HEADS={heads_at_once}", f'DEVICE_SOURCE="{rows}"', f'ATTENTION_SOURCE="{attention}"']
    options = ["-O3", "-std=c++17", "-arch=sm_90", "--disable-warnings", "-include", str(folder / "cases.h")]
    subprocess.run(["nvcc", *options, *(f"-D{each}" for each in defines), str(SOURCE), "-o", str(program)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=32)
    parser.add_argument("--ffn", type=int, default=11008)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--context", type=int, default=1150)
    parser.add_argument("--density", nargs="+", default=["1", "0.5"])
    parser.add_argument("--without-whole", action="store_true")
    parser.add_argument("--compile", type=Path, metavar="PROGRAM", help="only compile, to this file")
    options = parser.parse_args()
    if options.heads % options.kv_heads:
        parser.error("--heads must be a multiple of --kv-heads.")
    group = options.heads // options.kv_heads
    with tempfile.TemporaryDirectory() as folder:
        program = options.compile or Path(folder) / "device_layer"
        kernels = BY_MATRICES if options.without_whole else (*BY_MATRICES, WHOLE)
        compile_program(Path(folder), program, group if group < 3 else 4, kernels)
        if options.compile is None:
            sizes = (options.heads, options.kv_heads, options.ffn, options.layers, options.context)
            sys.exit(subprocess.run([program, *map(str, sizes), *options.density]).returncode)


if __name__ == "__main__":
    main()
