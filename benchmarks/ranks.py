"""Compare the time of calibrating or quantising in one process and in several ranks, on random weights of a true shape.

    python benchmarks/ranks.py FOLDER [--work quantize] [--shape llama-3.2-1b] [--ranks 1 --ranks 2]
        [--device cpu|cuda|auto]

It makes the model in FOLDER/SHAPE-DTYPE, or uses the one there, and reads the built-in text as bytes. Each run is one
process, or torchrun with a process for each rank. Every process gets as many cores as a rank of the largest run. A run
whose results are in FOLDER is not repeated. It prints one JSON line a run:

- seconds of the work, of each step, of the rest, which is mostly loading, and of the whole run with its start; and the
  ratios to the first run (`speedup`);
- the difference of the results: of prices and KL of the table, relative to the largest of the first run, or of the KL
  to the float model;
- peak memory of the first rank: PyTorch's on each GPU, and anonymous memory on the CPU.

Give several sequences for each rank, because the first sequence of a run includes the start of CUDA. An eighth of the
sequences of `quantize` measure the KL.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peak_memory import PeakMemory

from tda_export.bench.shapes import SHAPES
from tda_export.progress import Advance

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


class Timed:
    """Replaces progress bars, and records the time of each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, description: str, units: int) -> Iterator[Advance]:
        started = time.perf_counter()
        yield lambda done: None
        self.seconds[description] = time.perf_counter() - started


def make(options: argparse.Namespace) -> Path:
    """Make the model, unless it exists."""
    import torch

    from tda_export.bench.random_model import write_random_model
    from tda_export.bench.shapes import random_source
    from tda_export.graph.contract import DTYPES

    folder: Path = options.folder / f"{options.shape}-{options.dtype}"
    if not (folder / "tokenizer.json").is_file():  # which is written last
        source = random_source(options.shape)
        config = source.config
        config.architectures = [source.spec.architecture]
        write_random_model(config, folder, dtype=getattr(torch, DTYPES[options.dtype]))
    return folder


def builtin_corpus(tokenizer: Any, sequences: int, length: int) -> Any:
    """Cut the built-in text into sequences. Reading it as the CLI does needs a package that may be missing."""
    import torch

    from tda_export.calibration.corpus import Corpus, builtin_folder

    text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(builtin_folder().glob("*.txt")))
    tokens = tokenizer(text[: 2 * sequences * length]).input_ids[: sequences * length]
    cut = torch.tensor(tokens, dtype=torch.int64).view(sequences, length)
    return Corpus(cut, "builtin", hashlib.sha256(cut.numpy().tobytes()).hexdigest())


def run_rank(options: argparse.Namespace) -> None:
    """Work as one rank. The first rank prints time and memory, and writes the results."""
    import torch

    from tda_export import ranks as group
    from tda_export.models.source import resolve_model

    ranks = group.join(options.device)
    source = resolve_model(str(make(options)))
    shown = Timed()
    with PeakMemory() as memory:
        seconds, save = WORK[options.work](options, source, ranks, shown)
    if ranks.first:
        save(options.output)
        gpus = range(torch.cuda.device_count()) if options.device != "cpu" else ()
        report = {
            "device": torch.cuda.get_device_name() if gpus else "cpu",
            "work_seconds": seconds,
            "other_seconds": seconds - sum(shown.seconds.values()),
            "steps_seconds": shown.seconds,
            "peak_gpu_bytes": [torch.cuda.max_memory_allocated(gpu) for gpu in gpus],
            "peak_cpu_bytes": memory.peak,
        }
        print(json.dumps(report), flush=True)
    group.leave()


def calibrate(options: argparse.Namespace, source: Any, ranks: Any, shown: Timed) -> tuple[float, Any]:
    from tda_export.calibration.file import write_calibration
    from tda_export.calibration.run import CalibrationSettings
    from tda_export.calibration.run import calibrate as run

    settings = CalibrationSettings(
        sequences=options.sequences,
        prompt_tokens=options.prompt_tokens,
        continuation_tokens=options.continuation_tokens,
        dtype=options.dtype,
        device=options.device,
    )
    corpus = builtin_corpus(source.tokenizer, settings.sequences, settings.length)
    started = time.perf_counter()
    calibration = run(source, corpus, settings, {"max_kl": 0.05}, show=shown, ranks=ranks)
    return time.perf_counter() - started, lambda output: write_calibration(calibration, output)


def quantize(options: argparse.Namespace, source: Any, ranks: Any, shown: Timed) -> tuple[float, Any]:
    from tda_export.quantization.resume import PartialLayers
    from tda_export.quantization.run import quantize as run
    from tda_export.quantization.settings import QuantizeSettings

    held_out = max(1, options.sequences // 8)
    settings = QuantizeSettings(
        sequences=options.sequences - held_out,
        kl_sequences=held_out,
        prompt_tokens=options.prompt_tokens,
        continuation_tokens=options.continuation_tokens,
        device=options.device,
    )
    corpus = builtin_corpus(source.tokenizer, settings.all_sequences, settings.length)
    if ranks.first:
        PartialLayers(options.output, {}).remove()  # left by an interrupted run
    started = time.perf_counter()
    quantised = run(source, corpus, settings, show=shown, output=options.output, ranks=ranks)
    return time.perf_counter() - started, lambda output: output.write_text(json.dumps(quantised.about["loss"]))


WORK = {"calibrate": calibrate, "quantize": quantize}


def calibrations_differ(one: Path, other: Path) -> dict[str, float]:
    """Return the differences of two calibrations."""
    from tda_export.calibration.file import read_calibration

    first, second = read_calibration(one).priced, read_calibration(other).priced
    assert first is not None
    assert second is not None
    prices = max(
        float((square - second.sums.square[name]).abs().max() / square.max())
        for name, square in first.sums.square.items()
    )
    kl = max(
        float((measured.kl.mean(dim=0) - second.measured[packing].kl.mean(dim=0)).abs().max() / measured.kl.max())
        for packing, measured in first.measured.items()
    )
    return {"price_difference": prices, "kl_difference": kl}


def losses_differ(one: Path, other: Path) -> dict[str, float]:
    """Return the KL to the float model of two quantised models."""
    return {"first_kl": json.loads(one.read_text())["kl"], "kl": json.loads(other.read_text())["kl"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--ranks", type=int, action="append", help="1 and 2 by default")
    parser.add_argument("--device", choices=["cpu", "cuda", "auto"], default="cuda")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], default="bf16")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--continuation-tokens", type=int, default=128)
    parser.add_argument("--work", choices=WORK, default="calibrate")
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options)
        return
    if options.output:
        run_rank(options)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    counts = options.ranks or [1, 2]
    threads = max(1, len(os.sched_getaffinity(0)) // max(counts))  # equal in all runs, so that sums are rounded alike
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}

    def run(*arguments: str, start: tuple[str, ...] = ()) -> str:
        command = [sys.executable, *start, __file__, *sys.argv[1:], *arguments]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout

    run("--make")  # in a process of its own, so that this one takes no GPU memory
    first: tuple[Path, dict[str, Any]] | None = None
    for count in counts:
        setting = {"work": options.work, "shape": options.shape, "dtype": options.dtype, "device": options.device}
        lengths = {"prompt_tokens": options.prompt_tokens, "continuation_tokens": options.continuation_tokens}
        setting |= {"sequences": options.sequences, **lengths, "ranks": count}
        output = options.folder / "-".join(map(str, setting.values()))
        kept = output.with_name(f"{output.name}.json")
        if not kept.is_file():
            started = time.perf_counter()
            printed = run("--output", str(output), start=(*TORCHRUN, str(count)) if count > 1 else ())
            seconds = time.perf_counter() - started
            kept.write_text(json.dumps(setting | json.loads(printed.splitlines()[-1]) | {"run_seconds": seconds}))
        report = json.loads(kept.read_text())
        if first is None:
            first = output, report
        else:
            whole = {name: first[1][name] / report[name] for name in ("work_seconds", "run_seconds")}
            steps = {name: first[1]["steps_seconds"][name] / taken for name, taken in report["steps_seconds"].items()}
            report["speedup"] = whole | steps
            report |= (calibrations_differ if options.work == "calibrate" else losses_differ)(first[0], output)
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
