"""Time prompts of lengths that were not read before, and watch the memory that they leave.

    python benchmarks/prompt_lengths.py ARTIFACT [--prompts 100] [--shortest 100] [--longest 2000]
    python benchmarks/prompt_lengths.py ARTIFACT --any-attention

Reads prompts of different random lengths, each length once, and then all of them again. Attention may have work to do
for a length that it has not seen, such as choosing or compiling a kernel. With --any-attention ONNX Runtime takes its
own choice of kernels on CUDA, cuDNN's included (`runtime/providers.py` says which ones it has otherwise). ARTIFACT has
the layout `priced`.

Prints one JSON object: milliseconds of a prompt, the first time and again, as medians over lengths with their
quartiles; the median difference of the two; and by how many MB resident memory grew in each pass. A prompt of the
longest length is read before the measurement.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from tda_export.bench.decode import device_name
from tda_export.bench.priced import PricedRunner
from tda_export.errors import UsageError
from tda_export.runtime import load, providers
from tda_export.versions import installed_versions

ANY_KERNEL = 0  # the value of `sdpa_kernel` with which ONNX Runtime chooses
FIRST_TOKEN, TOKENS = 3, 250  # ids of the prompts, which every vocabulary has


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, as the module says.

    Raises:
        UsageError: There are not so many lengths, or the artifact has no prices.
    """
    if options.prompts < 1 or options.shortest < 1:
        raise UsageError("Give --prompts and --shortest of 1 or more.")
    lengths = range(options.shortest, options.longest)
    if options.prompts > len(lengths):
        raise UsageError(f"There are {len(lengths)} lengths. Give fewer --prompts, or --shortest and --longest apart.")
    model = load(options.artifact, provider=options.provider)
    provider = model.sessions.provider
    if options.any_attention and provider == providers.CPU:
        raise UsageError("--any-attention chooses kernels of CUDA, and this runs on the CPU. Leave it out.")
    if model.artifact.layout != "priced":
        raise UsageError(f"{options.artifact}: its layout is {model.artifact.layout}. Give an artifact with prices.")
    runner = PricedRunner(model.artifact, model.sessions, options.longest, 0.0)
    chance, process = random.Random(options.seed), psutil.Process()
    drawn = chance.sample(lengths, options.prompts)

    def read(length: int) -> float:
        prompt = [FIRST_TOKEN + chance.randrange(TOKENS) for _ in range(length)]
        started = time.perf_counter()
        runner.prefill(prompt)
        return 1e3 * (time.perf_counter() - started)

    read(options.longest)
    memory, times = [process.memory_info().rss], []
    for _ in range(2):
        times.append([read(length) for length in drawn])
        memory.append(process.memory_info().rss)
    first, again = times
    return {
        "device": device_name(provider),
        "packages": installed_versions(["tda-export", "onnxruntime", "onnxruntime-gpu"]),
        "prompts": options.prompts,
        "any_attention": options.any_attention,
        "first_ms": statistics.median(first),
        "first_ms_quartiles": statistics.quantiles(first, n=4) if len(first) > 1 else None,
        "again_ms": statistics.median(again),
        "again_ms_quartiles": statistics.quantiles(again, n=4) if len(again) > 1 else None,
        "difference_ms": statistics.median(one - other for one, other in zip(first, again, strict=True)),
        "grown_mb": [(after - before) / 1e6 for before, after in pairwise(memory)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--shortest", type=int, default=100, help="tokens")
    parser.add_argument("--longest", type=int, default=2000, help="tokens; prompts are shorter than this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--provider", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--any-attention", action="store_true", help="let ONNX Runtime choose attention's kernels")
    options = parser.parse_args()
    if options.any_attention:
        providers.ATTENTION_KERNELS = ANY_KERNEL
    try:
        print(json.dumps(measure(options)))
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
