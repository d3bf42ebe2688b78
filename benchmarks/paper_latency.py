"""The latency table of "First Activations Matter" (arXiv 2408.11393) on one GPU, beside the paper's seconds on an A100.

    python benchmarks/paper_latency.py FOLDER [--shape opt-2.7b …] [--part masks …] [--prompt-tokens 1024]
        [--new-tokens 1024] [--json]

Each artifact is built in FOLDER, measured and deleted before the next one is built, so FOLDER needs room for one (15 GB
for a 7B in fp16). With --build-only artifacts are kept, and later runs use them.

Weights are random, of true shapes; activations are fp16; the batch is 1. Logits are checked first. The parts of a
model:

- masks: dense (ONNX Runtime's own operators, captured), TT, Griffin and TDA at 50 % of the neurons, and two levels at
  50 % of the bytes;
- priced: dense again, all rows by the row kernel, and 0.70 and 0.50 of the bytes of all linears (rows are drawn at
  random, see `bench/artifact.py`);
- int4: the last three with weights in int4, in groups of 32 (random codes);
- kernel: the FFN's kernel alone.

Seconds are those of the prefill and of one step for each new token. The ceiling is the time of a token whose bytes are
read at a copy's bandwidth. TT drops neurons after it has computed gate and up, by stock operators, so it reads all
bytes. The kernel alone is measured with GELU in place of ReLU, since ReLU makes zeros. OPT's bytes leave out the down
rows of neurons that ReLU makes zero. If a part fails, it is reported, and the others are measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

METHODS = ("dense", "tt", "griffin", "tda", "two_levels")
BUILT = ("masks", "priced", "int4")  # parts that have an artifact each
PARTS = (*BUILT, "kernel")
PAPER_TOKENS = (1024, 1024)
# Seconds for as many tokens: dense, TT, Griffin, TDA.
PAPER_SECONDS = {
    "opt-2.7b": (32.95, 33.52, 26.96, 27.77),
    "gemma-2b": (30.17, 30.16, 23.92, 24.06),
    "llama-2-7b": (80.31, 78.88, 64.32, 66.25),
    "mistral-7b": (79.28, 76.26, 63.26, 64.94),
}
DTYPE = "float16"
SPARSITY = 0.5
PRICED_SPARSITIES = (0.3, SPARSITY)
PRICES = "bench-prices.json"  # a file in the folder of a priced artifact


def place_of(folder: Path, shape: str, part: str) -> Path:
    return folder / f"{shape}-{part}"


def build(shape: str, part: str, folder: Path) -> None:
    """Build a model's artifact for a part."""
    from tda_export.bench.artifact import build_random_artifact, build_random_priced
    from tda_export.bench.random_codes import random_storage
    from tda_export.bench.shapes import random_source
    from tda_export.graph.storage import read_plan

    source, place = random_source(shape), place_of(folder, shape, part)
    if part == "masks":
        build_random_artifact(source, place, DTYPE, SPARSITY, quiet=True)
        return
    plan = read_plan(source, "int4" if part == "int4" else "float", None, ())
    _, prices = build_random_priced(source, place, random_storage(DTYPE, plan), PRICED_SPARSITIES, quiet=True)
    named = {f"priced_{1 - sparsity:.2f}": price for sparsity, price in prices.items()}
    (place / PRICES).write_text(json.dumps(named))


@contextmanager
def with_artifact(shape: str, part: str, folder: Path) -> Iterator[Path]:
    """Find the artifact of a part in `folder`, or build it and delete it afterwards. Yields the folder that has it.

    Raises:
        TdaError: It could not be built.
    """
    from tda_export.errors import TdaError
    from tda_export.temporary import owned_folder

    if is_built(folder, shape, part):
        yield folder
        return
    with owned_folder(folder, "paper-latency") as own:
        command = [sys.executable, __file__, str(own), "--build-only", "--shape", shape, "--part", part]
        if subprocess.run(command, check=False).returncode:  # a process of its own, whose memory is free afterwards
            raise TdaError(f"{shape}, {part}: the artifact was not built. The reason stands above.")
        yield own


def is_built(folder: Path, shape: str, part: str) -> bool:
    place = place_of(folder, shape, part)
    return place.exists() if part == "masks" else (place / PRICES).is_file()


def latency(shape: str, part: str, folder: Path, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """Measure the artifact of a part: each method's seconds, milliseconds a token and fraction of the bandwidth.

    Raises:
        TdaError: The folder has the artifact of another model in its place.
    """
    from tda_export.bench.decode import BenchSettings, run_bench
    from tda_export.calibration.corpus import builtin_folder
    from tda_export.errors import TdaError
    from tda_export.runtime.artifact import open_artifact
    from tda_export.runtime.text import Text

    place = place_of(folder, shape, part)
    artifact = open_artifact(place)
    if (artifact.name, artifact.shape.dtype) != (shape, DTYPE):
        raise TdaError(f"{place}: an artifact of {artifact.name}, {artifact.shape.dtype}. Delete it.")
    settings = BenchSettings(METHODS, SPARSITY, prompt_tokens, new_tokens)
    if part != "masks":
        methods = ("dense", "dense_native", "priced") if part == "priced" else ("dense_native", "priced")
        settings = replace(settings, methods=methods, prices=json.loads((place / PRICES).read_text()))
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in sorted(builtin_folder().glob("*.txt")))
    prompt = list(islice(cycle(Text(artifact).encode(text)), prompt_tokens))
    result = run_bench(artifact, "cuda", settings, prompt)
    measured_there = (prompt_tokens, new_tokens) == PAPER_TOKENS
    paper = dict(zip(METHODS, PAPER_SECONDS[shape] if measured_there else (), strict=False))
    for name, row in rows_of(result):
        row["seconds"] = (row["prefill_ms"] + new_tokens * row["ms_per_token"]) / 1e3
        row["ceiling_ms"] = row["bytes_per_token"] / result["copy_gb_per_second"] / 1e6
        row["paper_a100_seconds"] = paper.get(name)
    return result


def rows_of(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the methods of a result with their figures."""
    return [(name, row) for name, row in result.items() if isinstance(row, dict) and "ms_per_token" in row]


def kernel(shape: str) -> dict[str, Any]:
    """Measure the kernel alone at the shape of a model's FFN."""
    from tda_export.bench.kernel import measure
    from tda_export.bench.shapes import random_source
    from tda_export.graph.ffn import FfnForm

    spec = random_source(shape).spec
    activation = "gelu_tanh" if spec.activation == "relu" else spec.activation
    form = FfnForm(activation, gated=spec.gated, two_levels=True)
    return measure(spec.hidden_size, spec.ffn_size, DTYPE, form)


def show_latency(shape: str, part: str, result: dict[str, Any]) -> None:
    print(f"{shape}, {part}, {result['device']}, copy {result['copy_gb_per_second']:,.0f} GB/s", flush=True)
    print(
        f"{'':12} {'s':>7} {'paper, A100':>12} {'ms a token':>11} {'ceiling':>8} {'of copy':>8} {'sparsity':>9}",
        flush=True,
    )
    for name, row in rows_of(result):
        paper = f"{row['paper_a100_seconds']:.2f}" if row["paper_a100_seconds"] else ""
        print(
            f"{name:12} {row['seconds']:7.2f} {paper:>12} {row['ms_per_token']:11.2f} {row['ceiling_ms']:8.2f} "
            f"{row['share_of_copy_bandwidth']:8.2f} {row['sparsity']:9.2f}",
            flush=True,
        )


def show_kernel(shape: str, part: str, result: dict[str, Any]) -> None:
    for name, row in result["settings"].items():
        share = row["share_of_copy_bandwidth"]
        print(f"  kernel, {name:32} {row['gb_per_second']:6,.0f} GB/s, {share:.2f} of copy", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", action="append", choices=PAPER_SECONDS, help="all four by default")
    parser.add_argument("--part", action="append", choices=PARTS, help="all by default")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=1024)
    parser.add_argument("--json", action="store_true", help="print a JSON line for each model and part")
    parser.add_argument("--build-only", action="store_true", help="measure nothing, and keep the artifacts")
    options = parser.parse_args()
    shapes, parts = options.shape or list(PAPER_SECONDS), options.part or list(PARTS)
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.build_only:
        for shape, part in product(shapes, parts):
            if part in BUILT and not is_built(options.folder, shape, part):
                build(shape, part, options.folder)
        return
    failed = []
    for shape, part in product(shapes, parts):
        try:
            if part == "kernel":
                result = kernel(shape)
            else:
                with with_artifact(shape, part, options.folder) as folder:
                    result = latency(shape, part, folder, options.prompt_tokens, options.new_tokens)
        except Exception:  # the other parts are still worth measuring
            traceback.print_exc()
            failed.append(f"{shape}, {part}")
            continue
        if options.json:
            print(json.dumps({"shape": shape, part: result}), flush=True)
        else:
            (show_kernel if part == "kernel" else show_latency)(shape, part, result)
    if failed:
        raise SystemExit(f"Failed: {'; '.join(failed)}.")


if __name__ == "__main__":
    main()
