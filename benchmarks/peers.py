"""Compare with other stacks on one GPU, in one run: same weights, same prompt, batch 1, float16.

    python benchmarks/peers.py FOLDER [--shape llama-2-7b] [--prompt-tokens 1024] [--new-tokens 1024]

Makes a random model of a true shape in FOLDER, then measures, each in a process of its own:

- Hugging Face transformers, eager, and with a static cache and torch.compile;
- ONNX Runtime GenAI, built by its own builder, CUDA graph on;
- ours: plain dense, dense by the native kernel, TDA and two levels at --sparsity;
- ours with priced rows: dense by the row kernel, and 0.7 and 0.5 of the bytes of all linears. Rows are drawn, since
  random weights have no prices: the share of each matrix is that of a real model (`bench/artifact.py`).

Every stack's logits after the prompt are compared with transformers' before its times count. Prints one JSON object:
median milliseconds a token with their range, and milliseconds to the first token. Needs `onnxruntime-genai-cuda` and
about 45 GB of disk for 7B.
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

HF_TOKENS = 64  # transformers is slower by factors, and as steady
ROUND = 16  # tokens, as tda-export bench takes them
LARGEST_ERROR = 5e-2  # of logits, relative to the largest
FIRST_TOKENS = 5  # repetitions
PRICED_SPARSITIES = (0.3, 0.5)


def prompt_of(options: argparse.Namespace) -> list[int]:
    return [3 + i * 7919 % 250 for i in range(options.prompt_tokens)]


def summary(seconds: list[float], firsts: list[float]) -> dict[str, Any]:
    """Milliseconds a token, as medians over rounds of tokens, and to the first token."""
    rounds = [1e3 * sum(seconds[i : i + ROUND]) / ROUND for i in range(0, len(seconds) - ROUND + 1, ROUND)]
    return {
        "ms_per_token": statistics.median(rounds),
        "ms_per_token_range": [min(rounds), max(rounds)],
        "prefill_ms": 1e3 * statistics.median(firsts),
        "prefill_ms_range": [1e3 * min(firsts), 1e3 * max(firsts)],
    }


def check(name: str, logits: np.ndarray, options: argparse.Namespace) -> float:
    """Compare logits [V] after the prompt with transformers' and return the error; refuse a large one."""
    expected = np.load(options.folder / "logits.npy")
    error = float(np.abs(logits - expected).max() / np.abs(expected).max())
    if not error <= LARGEST_ERROR:
        raise SystemExit(f"{name}: logits are {error:.1e} from transformers', so nothing is timed.")
    return error


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
    from tda_export.bench.artifact import build_random_priced
    from tda_export.graph.storage import Storage
    from tda_export.models.source import resolve_model

    source = resolve_model(str(options.folder / "model"))
    _, prices = build_random_priced(
        source, options.folder / "priced", Storage("float16"), PRICED_SPARSITIES, quiet=True
    )
    (options.folder / "prices.json").write_text(json.dumps({f"priced_{1 - p:.2f}": v for p, v in prices.items()}))
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

    generate()  # compiles
    runs = [generate() for _ in range(2)]
    return summary(runs[-1][0], [first for _, first in runs]) | {"error": error, "new_tokens": HF_TOKENS}


def genai_build(options: argparse.Namespace) -> dict[str, Any]:
    """Run GenAI's own model builder, CUDA graph on."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", options.folder / "model"]
    command += ["-o", options.folder / "genai", "-p", "fp16", "-e", "cuda", "-c", options.folder / "cache"]
    command += ["--extra_options", "enable_cuda_graph=1"]
    subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr)
    return {}


def genai(options: argparse.Namespace) -> dict[str, Any]:
    import onnxruntime_genai as og

    model = og.Model(str(options.folder / "genai"))
    prompt = prompt_of(options)

    def begin() -> Any:
        parameters = og.GeneratorParams(model)
        length = options.prompt_tokens + options.new_tokens + 1
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        return og.Generator(model, parameters)

    generator = begin()
    generator.append_tokens(prompt)
    error = check(
        "GenAI", np.asarray(generator.get_logits()).astype(np.float32).reshape(-1)[-vocabulary(options) :], options
    )
    firsts = []
    for _ in range(1 + FIRST_TOKENS):
        del generator
        generator = begin()
        started = time.perf_counter()
        generator.append_tokens(prompt)
        generator.generate_next_token()
        generator.get_next_tokens()
        firsts.append(time.perf_counter() - started)
    for _ in range(3):  # the first captures
        generator.generate_next_token()
    seconds = []
    for _ in range(options.new_tokens - 8):
        started = time.perf_counter()
        generator.generate_next_token()
        generator.get_next_tokens()
        seconds.append(time.perf_counter() - started)
    return summary(seconds, firsts[1:]) | {"error": error, "version": og.__version__, "new_tokens": len(seconds)}


def vocabulary(options: argparse.Namespace) -> int:
    return len(np.load(options.folder / "logits.npy"))


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
    from tda_export.bench.decode import BenchSettings, run_bench
    from tda_export.runtime import load, open_artifact
    from tda_export.runtime.scoring import continuation_logits

    folder, prompt = options.folder / "priced", prompt_of(options)
    model = load(folder, provider="cuda")
    error = check("priced", continuation_logits(model, prompt[:-1], prompt[-1:], mask="dense")[0], options)
    del model
    settings = BenchSettings(
        ("dense", "dense_native", "priced"),
        prices=json.loads((options.folder / "prices.json").read_text()),
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
    )
    return run_bench(open_artifact(folder), "cuda", settings, prompt) | {"error": error}


STEPS = {
    "make": make,
    "genai_build": genai_build,
    "build": build,
    "build_priced": build_priced,
    "transformers_eager": lambda options: transformers(options, compiled=False),
    "transformers_compiled": lambda options: transformers(options, compiled=True),
    "genai": genai,
    "ours": ours,
    "priced": priced,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="llama-2-7b", help="a name of tda_export.bench.shapes, or a config.json")
    parser.add_argument("--architecture", help="its class in transformers, where the name does not follow")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=1024)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument(
        "--step", choices=STEPS, action="append", help="run this step alone; may be given several times"
    )
    parser.add_argument("--only", choices=STEPS, help=argparse.SUPPRESS)  # in this process
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.only:
        print(json.dumps(STEPS[options.only](options)))
        return
    report: dict[str, Any] = {"python": platform.python_version()}
    for step in options.step or STEPS:
        started = time.perf_counter()
        command = [sys.executable, __file__, str(options.folder), "--only", step]
        for name in ("shape", "architecture", "prompt_tokens", "new_tokens", "sparsity"):
            if (value := getattr(options, name)) is not None:
                command += [f"--{name.replace('_', '-')}", str(value)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            report[step] = "failed"  # its own error is above; the others are measured all the same
        elif content := json.loads(done.stdout.splitlines()[-1]):
            report[step] = content
        print(f"{step}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        (options.folder / "report.json").write_text(json.dumps(report, indent=1))  # so far
    for step in ("ours", "priced"):
        if isinstance(report.get("genai"), dict) and isinstance(report.get(step), dict):
            for row in report[step].values():
                if isinstance(row, dict) and "ms_per_token" in row:
                    row["times_faster_than_genai"] = report["genai"]["ms_per_token"] / row["ms_per_token"]
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
