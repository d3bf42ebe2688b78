"""Compare with other stacks on one GPU, in one run: same weights, same prompt, batch 1, float16.

    python benchmarks/peers.py FOLDER [--shape llama-2-7b] [--prompt-tokens 1024] [--new-tokens 1024]

Makes a random model of a true shape in FOLDER, then measures each of these in a process of its own:

- Hugging Face transformers, eager, and with a static cache and torch.compile;
- ONNX Runtime GenAI, built by its own builder, CUDA graph on;
- ours: plain dense, dense by the native kernel, TDA and two levels at --sparsity;
- ours with priced rows: dense by the row kernel, and 0.7 and 0.5 of the bytes of the layers' linears. Random weights
  have no prices, so rows are drawn at random; the fraction of each matrix, and of the head, is that of a real model
  (`bench/artifact.py`);
- GenAI and ours in int4, in groups of 32: GenAI by its own builder, whose head has four bits, with and without its
  kernels `fpA_intB`, and ours with priced rows and random codes (`bench/random_codes.py`), the head in eight bits and
  in four.

Before a stack of floats is timed, its logits after the prompt are compared with transformers'. Logits of int4, which
has other weights, must be finite, and ours must be those of the function bodies. Prints one JSON object: median
milliseconds a token with their range, and milliseconds to the first token. Needs `onnxruntime-genai-cuda` and about 55
GB of disk for 7B.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

HF_TOKENS = 64  # fewer for transformers, which is several times slower and as steady
ROUND = 16  # tokens a round, as in tda-export bench
LARGEST_ERROR = 5e-2  # of logits, relative to the largest logit
FIRST_TOKENS = 5  # repetitions of the time to the first token
PRICED_SPARSITIES = (0.3, 0.5)
PEERS = {"ours": ("genai",), "priced": ("genai",), "int4": ("genai_int4", "genai_int4_fpa")}
PEERS["int4_head4"] = PEERS["int4"]


def prompt_of(options: argparse.Namespace) -> list[int]:
    return [3 + i * 7919 % 250 for i in range(options.prompt_tokens)]


def summary(seconds: list[float], firsts: list[float]) -> dict[str, Any]:
    """Return the milliseconds of a token, as medians over rounds, and those to the first token."""
    rounds = [1e3 * sum(seconds[i : i + ROUND]) / ROUND for i in range(0, len(seconds) - ROUND + 1, ROUND)]
    return {
        "ms_per_token": statistics.median(rounds),
        "ms_per_token_range": [min(rounds), max(rounds)],
        "prefill_ms": 1e3 * statistics.median(firsts),
        "prefill_ms_range": [1e3 * min(firsts), 1e3 * max(firsts)],
    }


def check(name: str, logits: np.ndarray, options: argparse.Namespace) -> float:
    """Return the error of logits [V] after the prompt, relative to transformers'. Refuse a large one."""
    expected = np.load(options.folder / "logits.npy")
    error = float(np.abs(logits - expected).max() / np.abs(expected).max())
    if not error <= LARGEST_ERROR:
        raise SystemExit(f"{name}: logits are {error:.1e} from transformers', so nothing was timed.")
    return error


def check_finite(name: str, logits: np.ndarray) -> None:
    """Refuse logits that are not finite."""
    if not np.isfinite(logits).all():
        raise SystemExit(f"{name}: logits are not finite, so nothing was timed.")


def make(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from tda_export.bench.random_model import write_random_model
    from tda_export.bench.shapes import random_source

    config = random_source(options.shape).config
    config.architectures = [options.architecture or type(config).__name__.replace("Config", "ForCausalLM")]
    write_random_model(config, options.folder / "model", dtype=torch.float16)
    return {}


def build(options: argparse.Namespace) -> dict[str, Any]:
    from tda_export.bench.artifact import build_random_artifact
    from tda_export.models.source import resolve_model

    source = resolve_model(str(options.folder / "model"))
    build_random_artifact(source, options.folder / "artifact", "float16", options.sparsity, quiet=True)
    return {}


def build_priced(options: argparse.Namespace) -> dict[str, Any]:
    from tda_export.graph.storage import Storage
    from tda_export.models.source import resolve_model

    return build_rows(options, resolve_model(str(options.folder / "model")), Storage("float16"), "priced")


def build_int4(options: argparse.Namespace, name: str = "int4", rules: tuple[str, ...] = ()) -> dict[str, Any]:
    from tda_export.bench.random_codes import random_storage
    from tda_export.bench.shapes import random_source
    from tda_export.graph.storage import read_plan
    from tda_export.weights.formats import DEFAULT_GROUP

    source = random_source(options.shape)
    storage = random_storage("float16", read_plan(source, "int4", DEFAULT_GROUP, rules))
    return build_rows(options, source, storage, name)


def build_rows(options: argparse.Namespace, source: Any, storage: Any, name: str) -> dict[str, Any]:
    """Build an artifact with priced rows in the folder of this name, and write its prices beside it."""
    from tda_export.bench.artifact import build_random_priced

    _, prices = build_random_priced(
        source, options.folder / name, storage, PRICED_SPARSITIES, head=options.head, quiet=True
    )
    named = {f"priced_{1 - sparsity:.2f}": price for sparsity, price in prices.items()}
    (options.folder / f"{name}-prices.json").write_text(json.dumps(named))
    return {}


def transformers(options: argparse.Namespace, compiled: bool) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    model = AutoModelForCausalLM.from_pretrained(options.folder / "model", dtype=torch.float16).to("cuda").eval()
    prompt = torch.tensor([prompt_of(options)], device="cuda")
    with torch.inference_mode():
        logits = model(prompt).logits[0, -1].float().cpu().numpy()
    if not compiled:
        np.save(options.folder / "logits.npy", logits)
    error = check("transformers", logits, options)

    class Clock(StoppingCriteria):
        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: Any, scores: Any, **rest: Any) -> Any:
            torch.cuda.synchronize()
            self.times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def generate() -> tuple[list[float], float]:
        clock = Clock()
        arguments = {"cache_implementation": "static"} if compiled else {}
        torch.cuda.synchronize()
        started = time.perf_counter()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=HF_TOKENS,
            max_new_tokens=HF_TOKENS,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
            **arguments,
        )
        return [later - earlier for earlier, later in pairwise(clock.times)], clock.times[0] - started

    generate()  # the first call compiles
    runs = [generate() for _ in range(2)]
    return summary(runs[-1][0], [first for _, first in runs]) | {"error": error, "new_tokens": HF_TOKENS}


def genai_build(options: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Run GenAI's own model builder with the CUDA graph on. Its int4 is in blocks of 32."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", options.folder / "model"]
    command += ["-o", options.folder / f"genai-{precision}", "-p", precision, "-e", "cuda"]
    command += ["-c", options.folder / "cache", "--extra_options", "enable_cuda_graph=1"]
    subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr)
    return {}


def genai(options: argparse.Namespace, precision: str, session_options: dict[str, str] | None = None) -> dict[str, Any]:
    import onnxruntime_genai as og

    config = og.Config(str(options.folder / f"genai-{precision}"))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session_options or {}}}}))
    model = og.Model(config)
    prompt = prompt_of(options)

    def begin() -> Any:
        parameters = og.GeneratorParams(model)
        length = options.prompt_tokens + options.new_tokens + 1
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        return og.Generator(model, parameters)

    generator = begin()
    generator.append_tokens(prompt)
    logits = np.asarray(generator.get_logits()).astype(np.float32).reshape(-1)[-vocabulary(options) :]
    check_finite("GenAI", logits)
    error = check("GenAI", logits, options) if precision == "fp16" else None
    firsts = []
    for _ in range(1 + FIRST_TOKENS):
        del generator
        generator = begin()
        started = time.perf_counter()
        generator.append_tokens(prompt)
        generator.generate_next_token()
        generator.get_next_tokens()
        firsts.append(time.perf_counter() - started)
    for _ in range(3):  # the first one captures the graph
        generator.generate_next_token()
    seconds = []
    for _ in range(options.new_tokens - 8):
        started = time.perf_counter()
        generator.generate_next_token()
        generator.get_next_tokens()
        seconds.append(time.perf_counter() - started)
    return summary(seconds, firsts[1:]) | {"error": error, "version": og.__version__, "new_tokens": len(seconds)}


def vocabulary(options: argparse.Namespace) -> int:
    return int(json.loads((options.folder / "model" / "config.json").read_text())["vocab_size"])


def ours(options: argparse.Namespace) -> dict[str, Any]:
    from tda_export.bench.decode import BenchSettings, run_bench
    from tda_export.runtime import load, open_artifact
    from tda_export.runtime.scoring import continuation_logits

    folder, prompt = options.folder / "artifact", prompt_of(options)
    model = load(folder, provider="cuda")
    error = check("ours", continuation_logits(model, prompt[:-1], prompt[-1:], mask="dense")[0], options)
    del model
    settings = BenchSettings(
        ("dense", "dense_native", "tda", "two_levels"), options.sparsity, options.prompt_tokens, options.new_tokens
    )
    return run_bench(open_artifact(folder), "cuda", settings, prompt) | {"error": error}


def priced(options: argparse.Namespace) -> dict[str, Any]:
    from tda_export.runtime import load
    from tda_export.runtime.scoring import continuation_logits

    prompt = prompt_of(options)
    model = load(options.folder / "priced", provider="cuda")
    error = check("priced", continuation_logits(model, prompt[:-1], prompt[-1:], mask="dense")[0], options)
    del model
    return bench_rows(options, "priced", ("dense", "dense_native", "priced")) | {"error": error}


def bench_rows(options: argparse.Namespace, name: str, methods: tuple[str, ...]) -> dict[str, Any]:
    """Time an artifact of `build_rows`."""
    from tda_export.bench.decode import BenchSettings, run_bench
    from tda_export.runtime import open_artifact

    settings = BenchSettings(
        methods,
        prices=json.loads((options.folder / f"{name}-prices.json").read_text()),
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
    )
    return run_bench(open_artifact(options.folder / name), "cuda", settings, prompt_of(options))


def beside_genai(report: dict[str, Any]) -> None:
    """Add to our rows the speed-up over the fastest of GenAI's of the same precision."""
    for step, peers in PEERS.items():
        times = [report[peer]["ms_per_token"] for peer in peers if isinstance(report.get(peer), dict)]
        if not times or not isinstance(report.get(step), dict):
            continue
        for row in report[step].values():
            if isinstance(row, dict) and "ms_per_token" in row:
                row["times_faster_than_genai"] = min(times) / row["ms_per_token"]


STEPS = {
    "make": make,
    "genai_build": lambda options: genai_build(options, "fp16"),
    "genai_int4_build": lambda options: genai_build(options, "int4"),
    "build": build,
    "build_priced": build_priced,
    "build_int4": build_int4,
    "build_int4_head4": lambda options: build_int4(options, "int4_head4", ("head=int4",)),
    "transformers_eager": lambda options: transformers(options, compiled=False),
    "transformers_compiled": lambda options: transformers(options, compiled=True),
    "genai": lambda options: genai(options, "fp16"),
    "genai_int4": lambda options: genai(options, "int4"),
    "genai_int4_fpa": lambda options: genai(options, "int4", {"ep.cuda.fpa_intb_gemm": "1"}),
    "ours": ours,
    "priced": priced,
    "int4": lambda options: bench_rows(options, "int4", ("dense_native", "priced")),
    "int4_head4": lambda options: bench_rows(options, "int4_head4", ("dense_native", "priced")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--head", choices=["priced", "whole"], default="priced", help="rows of our heads")
    parser.add_argument("--shape", default="llama-2-7b", help="a name of tda_export.bench.shapes, or a config.json")
    parser.add_argument("--architecture", help="class in transformers, if its name is not that of the model type")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=1024)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument(
        "--step", choices=STEPS, action="append", help="run this step alone; may be given several times"
    )
    parser.add_argument("--only", choices=STEPS, help=argparse.SUPPRESS)  # runs in this process
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.only:
        print(json.dumps(STEPS[options.only](options)))
        return
    report: dict[str, Any] = {"python": platform.python_version()}
    for step in options.step or STEPS:
        started = time.perf_counter()
        command = [sys.executable, __file__, str(options.folder), "--only", step]
        for name in ("shape", "architecture", "prompt_tokens", "new_tokens", "sparsity", "head"):
            if (value := getattr(options, name)) is not None:
                command += [f"--{name.replace('_', '-')}", str(value)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            report[step] = "failed"  # its error is printed above; the other steps still run
        elif content := json.loads(done.stdout.splitlines()[-1]):
            report[step] = content
        print(f"{step}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        (options.folder / "report.json").write_text(json.dumps(report, indent=1))  # the report so far
    beside_genai(report)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
