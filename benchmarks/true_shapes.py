"""Build models of true shapes from random safetensors checkpoints, generate once, and delete what was built.

    python benchmarks/true_shapes.py FOLDER [--shape opt-350m …] [--dtype fp16]

Prints one JSON line a model: its shape, file sizes, seconds and peak anonymous memory of the build (`--no-verify`) with
its bound (1.5 GiB and twice the largest tensor), and seconds and tokens of one generation. A model is made, built and
run in three processes. If one fails, the line names the step (`failed`), and the next model follows. FOLDER needs room
for one checkpoint and one artifact (32 GB for an 8B model in fp16). Generation runs on the GPU if there is one, and
otherwise on the CPU, with fp32 or fp16.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from peak_memory import PeakMemory

from tda_export.bench.shapes import SHAPES

PAPER = ("opt-350m", "opt-2.7b", "gemma-2b", "llama-2-7b", "llama-3-8b", "mistral-7b")
NEW_TOKENS = 32
ALLOWED_BYTES = 3 << 29  # 1.5 GiB; twice the largest tensor is added
PROMPT = "The history of the lighthouse began in the year"


def make(folder: Path, shape: str, dtype: str) -> dict[str, Any]:
    import torch

    from tda_export.bench.random_model import write_random_model
    from tda_export.bench.shapes import random_source
    from tda_export.graph.contract import DTYPES
    from tda_export.models.weights import open_safetensors

    config = random_source(shape).config
    config.architectures = [random_source(shape).spec.architecture]
    write_random_model(config, folder / "model", dtype=getattr(torch, DTYPES[dtype]))
    weights = open_safetensors(folder / "model")
    sizes = [torch.Size(weights.shape(name)).numel() for name in weights.names]
    element = torch.finfo(getattr(torch, DTYPES[dtype])).bits // 8
    return {
        "checkpoint_bytes": sum(file.stat().st_size for file in weights.files),
        "largest_tensor_bytes": max(sizes) * element,
        "parameters": sum(sizes),
    }


def build(folder: Path, shape: str, dtype: str) -> dict[str, Any]:
    from click.testing import CliRunner

    from tda_export.cli.main import cli

    arguments = ["build", str(folder / "model"), "--method", "griffin", "--sparsity", "0.5", "--no-verify", "--json"]
    started = time.perf_counter()
    with PeakMemory() as memory:
        result = CliRunner().invoke(cli, [*arguments, "--dtype", dtype, "-o", str(folder / "artifact")])
    if result.exit_code:
        raise SystemExit(result.output)
    return {
        "build_seconds": time.perf_counter() - started,
        "build_peak_anonymous_bytes": memory.peak,
        "artifact_bytes": {file.name: file.stat().st_size for file in sorted((folder / "artifact").iterdir())},
    }


def run(folder: Path, shape: str, dtype: str) -> dict[str, Any]:
    from dataclasses import asdict

    from tda_export.bench.decode import device_name
    from tda_export.runtime import load

    started = time.perf_counter()
    model = load(folder / "artifact")
    loaded = time.perf_counter() - started
    result: dict[str, Any] = {"shape": asdict(model.artifact.shape), "load_seconds": loaded}
    for mask in ("dense", "tda"):
        generation = model.generate(PROMPT, mask=mask, max_new_tokens=NEW_TOKENS)  # type: ignore[arg-type]
        tokens = [token.id for token in generation]
        result[mask] = {"tokens": tokens, **asdict(generation.metrics)}
    return result | {"device": device_name(model.sessions.provider)}


STEPS = {"make": make, "build": build, "run": run}


def measure(folder: Path, shape: str, dtype: str, steps: list[str]) -> dict[str, Any]:
    """Run the steps of one model until one fails, which `failed` then names. Delete the model's files."""
    report: dict[str, Any] = {"model": shape, "dtype": dtype}
    try:
        for step in steps:
            command = [sys.executable, __file__, str(folder), "--shape", shape, "--dtype", dtype, "--step", step]
            result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if result.returncode:  # its error is on standard error
                report["failed"] = step
                break
            report |= json.loads(result.stdout.splitlines()[-1])
            print(f"{shape}: {step} done", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if "build_peak_anonymous_bytes" not in report:
        return report
    allowed = ALLOWED_BYTES + 2 * report["largest_tensor_bytes"]
    peak = report["build_peak_anonymous_bytes"]
    return report | {"allowed_anonymous_bytes": allowed, "within_allowed": peak <= allowed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="the paper's six by default")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], default="fp16")
    parser.add_argument("--build-only", action="store_true", help="measure the build alone")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    shapes = options.shape or PAPER
    if options.step:
        print(json.dumps(STEPS[options.step](options.folder, shapes[0], options.dtype)))
        return
    steps = [step for step in STEPS if step != "run" or not options.build_only]
    failed = []
    for shape in shapes:
        folder = options.folder / shape
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # it may be anything, so it is not deleted
            failed.append(f"{folder} is there already, delete it")
            continue
        report = measure(folder, shape, options.dtype, steps)
        print(json.dumps(report), flush=True)
        if "failed" in report:
            failed.append(f"{shape}: {report['failed']} failed")
        if not report.get("within_allowed", True):
            failed.append(f"{shape}: the build took more memory than allowed")
    if failed:
        raise SystemExit("; ".join(failed))


if __name__ == "__main__":
    main()
