"""Time the kernels of RowLinear4 or RowLinear8 without ONNX Runtime, and say when blocks reach each step of a kernel.

    python benchmarks/device_rows.py [--bits 4] [--shape 4096x4096 ..] [--density 1 0.5 ..] [--stamps]
        [--compile PROGRAM]

Float16, groups of 32, outputs in multiples of 256. It compiles device/row_linear.cu and device_rows.cu with nvcc for
GPUs of compute capability 9.0, which have clusters, and runs the program on the GPU of this machine; with `--compile`
it leaves the program there instead. Each result is compared with a slow kernel's before anything is timed. Weights are
random, of more bytes than caches hold; a step is a captured graph of one launch for each matrix.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

from tda_export.native.build import device_sources

SOURCE = Path(__file__).with_suffix(".cu")
# By bits: kernels by name, with the columns of a thread, threads, and sets of 16 rows under way in shared memory, whose
# sizes device/row_sums_matrices.cuh asserts.
LIST_BYTES, MATRIX_BYTES = 768, {4: 2432, 8: 4608}
KERNELS = {
    4: {"1_small_8_3": (8, 256, 2), "1_large_16_1": (8, 512, 3), "1_32_8_2": (32, 256, 0), "1_16_8_2": (16, 256, 0)},
    8: {"1_small_8_3": (8, 256, 1), "1_large_16_1": (8, 512, 2), "1_8_8_3": (8, 256, 0), "1_8_8_2": (8, 256, 0)},
}
LAST = {"1_8_16_1": (8, 512, 0)}
# The kernel of blocks that stay has as much shared memory as there is on a GPU of compute capability 9.0, but for a
# little; a launch takes what its shape needs.
WHOLE, WHOLE_BYTES = "1_whole_16_1", (227 << 10) - 4096
# What stands where a block reaches a step, and what is put ahead of it.
STAMPS = {
    "  constexpr int kSlice = kWarp * kWidth;\n  union Shared {": "BEGIN_STAMPS(a.counters);",
    "    LetNextKernelStart();\n    if (!a.early)": "STAMP(1);",
    "    reader.Add(early, values[0], listed_rows);": "if (base == 0) STAMP(2);",
    "  const Totals totals = {a.bias,\n": "STAMP(3);",
    "#else\n  AddBlocksInMemory<typename Format::Lanes>(sums, shared.sums, a.partial": "STAMP(4);",
    # Likewise of blocks that stay.
    "  TDA_DYNAMIC_MEMORY(memory);\n  __shared__ typename Whole::Counts counts;": "BEGIN_STAMPS(a.counters);",
    "  if (own.Adds()) whole.Add(": "STAMP(2);",
    "  whole_totals.Store(sums, ": "STAMP(3);",
    "}\n#endif\n\n#if TDA_BITS\n#define TDA_ROW_FORMAT": "STAMP(4);",
}


def device_code(stamps: bool) -> str:
    """Return the device code, with a stamp at each step where wanted."""
    text = device_sources()["row_linear"]
    for place, stamp in STAMPS.items() if stamps else ():
        if text.count(place) != 1:
            raise SystemExit(f"device/row_linear.cu has changed: {place.strip()!r} is there {text.count(place)} times.")
        text = text.replace(place, f"  {stamp}\n{place}")
    return text


def cases_of(bits: int, names: Collection[str] | None = None) -> str:
    """Return KERNELS for device_rows.cu, all of them or those of these names."""
    rows = []
    for name, (width, threads, matrices) in (KERNELS[bits] | LAST).items():
        if names is not None and name not in names:
            continue
        memory = threads // 32 * (matrices * MATRIX_BYTES[bits] + LIST_BYTES) if matrices else 0
        rows.append(f'{{"{name}", RowLinear_{name}, {width}, {threads}, {memory}, {16 if matrices else 4}}}')
    if names is None or WHOLE in names:
        under_way = KERNELS[bits]["1_small_8_3"][2]
        rows.append(f'{{"{WHOLE}", RowLinear_{WHOLE}, 8, 512, {WHOLE_BYTES}, 16, {under_way}}}')
    return ", ".join(rows)


def compile_program(folder: Path, program: Path, bits: int, stamps: bool) -> None:
    source = folder / "row_linear.cuh"
    source.write_text(device_code(stamps), encoding="utf-8")
    (folder / "cases.h").write_text(f"#define KERNELS {cases_of(bits)}\n", encoding="utf-8")
    defines = ["TDA_BF16=0", f"TDA_BITS={bits}", "TDA_CLUSTERS=1", "TDA_INPUTS=0", f'DEVICE_SOURCE="{source}"']
    options = ["-O3", "-std=c++17", "-arch=sm_90", "--disable-warnings", "-include", str(folder / "cases.h")]
    subprocess.run(["nvcc", *options, *(f"-D{each}" for each in defines), str(SOURCE), "-o", str(program)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, choices=sorted(KERNELS), default=4)
    parser.add_argument("--shape", nargs="+", default=["4096x4096", "4096x12288", "4096x22016", "11008x4096"])
    parser.add_argument("--density", nargs="+", default=["1", "0.5"])
    parser.add_argument("--stamps", action="store_true", help="also when blocks reach each step")
    parser.add_argument("--compile", type=Path, metavar="PROGRAM", help="only compile, to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = options.compile or Path(folder) / "device_rows"
        compile_program(Path(folder), program, options.bits, options.stamps)
        if options.compile is None:
            stamps = ["--stamps"] if options.stamps else []
            sys.exit(subprocess.run([program, *stamps, *options.shape, *options.density]).returncode)


if __name__ == "__main__":
    main()
