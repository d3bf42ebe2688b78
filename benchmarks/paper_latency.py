"""The latency table of "First Activations Matter" (arXiv 2408.11393) on one GPU, beside the paper's seconds on an A100.

    python benchmarks/paper_latency.py FOLDER [--shape opt-2.7b …] [--prompt-tokens 1024] [--new-tokens 1024] [--json]

FOLDER keeps the artifacts, 38 GB for the four models: they are built first, all at once, and one that is there is used.

Random weights of true shapes in fp16, batch 1. Of each model one run compares, after checking logits: dense (ONNX
Runtime's own operators, captured), TT, Griffin and TDA at 50 % of the neurons, and two levels at 50 % of the bytes.
Seconds are prefill and as many steps as new tokens. The ceiling is the time in which a copy's bandwidth brings in the
bytes that a token reads. TT drops neurons token by token after computing gate and up, by stock operators, so it reads
all bytes whatever it keeps. Then the kernel alone at the model's FFN shape; ReLU's is measured as GELU, which has no
zeros. OPT's bytes leave out the down rows of neurons that ReLU makes zero. A part that
fails is reported, and the others are measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

METHODS = ("dense", "tt", "griffin", "tda", "two_levels")
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


def build(shape: str, folder: Path) -> None:
    """Build a model's artifact."""
    from tda_export.bench.artifact import build_random_artifact
    from tda_export.bench.shapes import random_source

    build_random_artifact(random_source(shape), folder / shape, DTYPE, SPARSITY, quiet=True)


def build_missing(shapes: Iterable[str], folder: Path) -> None:
    """Build the artifacts that are not there, each in a process of its own."""
    command = [sys.executable, __file__, str(folder), "--build-only", "--shape"]
    running = [subprocess.Popen([*command, shape]) for shape in shapes if not (folder / shape).exists()]
    for process in running:
        process.wait()  # one that failed has said why, and its measurement will fail too


def latency(shape: str, folder: Path, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """Measure one model: each method's seconds, milliseconds a token and share of the bandwidth."""
    from tda_export.bench.decode import BenchSettings, run_bench
    from tda_export.calibration.corpus import builtin_folder
    from tda_export.errors import TdaError
    from tda_export.runtime.artifact import open_artifact
    from tda_export.runtime.text import Text

    artifact = open_artifact(folder / shape)
    if (artifact.name, artifact.shape.dtype) != (shape, DTYPE):
        raise TdaError(f"{folder / shape}: an artifact of {artifact.name}, {artifact.shape.dtype}. Delete it.")
    settings = BenchSettings(METHODS, SPARSITY, prompt_tokens, new_tokens)
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in sorted(builtin_folder().glob("*.txt")))
    prompt = list(islice(cycle(Text(artifact).encode(text)), prompt_tokens))
    result = run_bench(artifact, "cuda", settings, prompt)
    measured_there = (prompt_tokens, new_tokens) == PAPER_TOKENS
    paper = dict(zip(METHODS, PAPER_SECONDS[shape] if measured_there else (), strict=False))
    for name in METHODS:
        row = result[name]
        row["seconds"] = (row["prefill_ms"] + new_tokens * row["ms_per_token"]) / 1e3
        row["ceiling_ms"] = row["bytes_per_token"] / result["copy_gb_per_second"] / 1e6
        row["paper_a100_seconds"] = paper.get(name)
    return result


def kernel(shape: str) -> dict[str, Any]:
    """Measure the kernel alone at a model's FFN shape."""
    from tda_export.bench.kernel import measure
    from tda_export.bench.shapes import random_source
    from tda_export.graph.ffn import FfnForm

    spec = random_source(shape).spec
    activation = "gelu_tanh" if spec.activation == "relu" else spec.activation
    form = FfnForm(activation, gated=spec.gated, two_levels=True)
    return measure(spec.hidden_size, spec.ffn_size, DTYPE, form)


def show_latency(shape: str, result: dict[str, Any]) -> None:
    print(f"{shape}, {result['device']}, copy {result['copy_gb_per_second']:,.0f} GB/s", flush=True)
    print(
        f"{'':12} {'s':>7} {'paper, A100':>12} {'ms a token':>11} {'ceiling':>8} {'of copy':>8} {'sparsity':>9}",
        flush=True,
    )
    for name in METHODS:
        row = result[name]
        paper = f"{row['paper_a100_seconds']:.2f}" if row["paper_a100_seconds"] else ""
        print(
            f"{name:12} {row['seconds']:7.2f} {paper:>12} {row['ms_per_token']:11.2f} {row['ceiling_ms']:8.2f} "
            f"{row['share_of_copy_bandwidth']:8.2f} {row['sparsity']:9.2f}",
            flush=True,
        )


def show_kernel(shape: str, result: dict[str, Any]) -> None:
    for name, row in result["settings"].items():
        share = row["share_of_copy_bandwidth"]
        print(f"  kernel, {name:32} {row['gb_per_second']:6,.0f} GB/s, {share:.2f} of copy", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", action="append", choices=PAPER_SECONDS, help="all four by default")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=1024)
    parser.add_argument("--json", action="store_true", help="print two JSON lines a model, latency and kernel")
    parser.add_argument("--build-only", action="store_true", help="measure nothing")
    options = parser.parse_args()
    shapes = options.shape or list(PAPER_SECONDS)
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.build_only:
        for shape in shapes:
            build(shape, options.folder)
        return
    build_missing(shapes, options.folder)
    failed = []
    for shape in shapes:
        parts: tuple[tuple[str, Callable[[], dict[str, Any]], Callable[[str, dict[str, Any]], None]], ...] = (
            (
                "latency",
                partial(latency, shape, options.folder, options.prompt_tokens, options.new_tokens),
                show_latency,
            ),
            ("kernel", partial(kernel, shape), show_kernel),
        )
        for part, measure, show in parts:
            try:
                result = measure()
            except Exception:  # what was measured, and what comes after, is worth having all the same
                traceback.print_exc()
                failed.append(f"{shape}, {part}")
                continue
            if options.json:
                print(json.dumps({"shape": shape, part: result}), flush=True)
            else:
                show(shape, result)
    if failed:
        raise SystemExit(f"Failed: {'; '.join(failed)}.")


if __name__ == "__main__":
    main()
