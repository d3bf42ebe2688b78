"""Build and run an artifact of LLaMA-2-7B's true shape with random weights on one GPU.

    python benchmarks/end_to_end_7b.py FOLDER

It calibrates, builds float16, verifies against transformers, loads and generates. It prints one JSON object: seconds
and peak memory of the build, device memory of both sessions beside the size of the weights, and the time of a token. It
needs 27 GB of disk, and for the verification a GPU that holds the model once in float32 and twice in float16 (80 GB
were enough).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peak_memory import PeakMemory

NEW_TOKENS = 64
REPETITIONS = 5
PROMPT_TOKENS = 1024


def gpu_memory() -> int:
    """Return the bytes in use on the device, by all processes."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]) << 20


def make(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig

    from tda_export.bench.random_model import write_random_model

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    write_random_model(config, folder / "model", dtype=torch.float16)


def calibrate(folder: Path) -> dict[str, Any]:
    import torch

    from tda_export.calibration.corpus import Corpus
    from tda_export.calibration.file import write_calibration
    from tda_export.calibration.run import CalibrationSettings
    from tda_export.calibration.run import calibrate as run
    from tda_export.models.source import resolve_model

    settings = CalibrationSettings(method="tda", sequences=8, dtype="fp16", device="cuda")
    tokens = torch.randint(3, 32000, (settings.sequences, settings.length), generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    source = resolve_model(str(folder / "model"))
    calibration = run(source, Corpus(tokens, "random tokens", ""), settings, {"sparsity": 0.5}, lambda units: None)
    write_calibration(calibration, folder / "calibration.safetensors")
    return {"calibrate_seconds": time.perf_counter() - started, "calibrate_sequences": settings.sequences}


def build(folder: Path) -> dict[str, Any]:
    from click.testing import CliRunner

    from tda_export.cli.main import cli

    output = folder / "artifact"
    arguments = ["build", str(folder / "model"), "--method", "tda"]
    arguments += ["--calibration", str(folder / "calibration.safetensors")]
    started = time.perf_counter()
    with PeakMemory() as memory:
        result = CliRunner().invoke(cli, [*arguments, "--dtype", "fp16", "--no-verify", "--json", "-o", str(output)])
    if result.exit_code:
        raise SystemExit(result.output)
    return {
        "build_seconds": time.perf_counter() - started,
        "build_peak_anonymous_bytes": memory.peak,
        "weights_bytes": (output / "weights.bin").stat().st_size,
    }


def verify(folder: Path) -> dict[str, Any]:
    from tda_export.graph.verify import verify_artifact
    from tda_export.models.source import resolve_model

    started = time.perf_counter()
    checks = verify_artifact(folder / "artifact", resolve_model, provider="cuda", quiet=True)
    results = [asdict(check) | {"passed": check.passed} for check in checks]
    if not all(check.passed for check in checks):
        raise SystemExit(f"Verification failed, so nothing was timed: {results}")
    return {"verify_seconds": time.perf_counter() - started, "verify": results}


def run(folder: Path) -> dict[str, Any]:
    import onnxruntime

    from tda_export.graph.contract import DECODE_FILE, PREFILL_FILE, WEIGHTS_FILE
    from tda_export.runtime import load, open_artifact
    from tda_export.runtime.session import empty_tensor, open_session, upload_weights

    before = gpu_memory()
    artifact = open_artifact(folder / "artifact")
    memory: dict[str, int] = {}
    empty_tensor((1,), "float16", "cuda")
    memory["cuda_context"] = gpu_memory() - before
    weights = upload_weights(artifact)
    memory["with_weights"] = gpu_memory() - before
    used = artifact.manifest["graph_weights"]
    prefill = open_session(artifact, PREFILL_FILE, "cuda", {name: weights[name] for name in used[PREFILL_FILE]})
    memory["with_prefill_session"] = gpu_memory() - before
    decode = open_session(artifact, DECODE_FILE, "cuda", {name: weights[name] for name in used[DECODE_FILE]})
    memory["with_both_sessions"] = gpu_memory() - before
    weights_bytes = artifact.file(WEIGHTS_FILE).stat().st_size
    assert memory["with_both_sessions"] - memory["with_weights"] < 0.1 * weights_bytes, "a session copied the weights"
    del prefill, decode, weights
    started = time.perf_counter()
    model = load(folder / "artifact", provider="cuda")
    result: dict[str, Any] = {"load_seconds": time.perf_counter() - started, "device_bytes": memory}
    prompt = [3 + i * 7919 % 31997 for i in range(PROMPT_TOKENS)]
    for mask in ("dense", "tda"):
        times = []
        for _ in range(1 + REPETITIONS):  # the first one warms up
            generation = model.generate(prompt, mask=mask, max_new_tokens=NEW_TOKENS)  # type: ignore[arg-type]
            assert len(list(generation)) == NEW_TOKENS
            times.append((generation.metrics.decode_seconds / (NEW_TOKENS - 1), generation.metrics.time_to_first_token))
        steps, firsts = (sorted(1000 * time for time in column) for column in zip(*times[1:], strict=True))
        result[mask] = {
            "sparsity": generation.metrics.sparsity,
            "decode_ms_per_token": {"median": statistics.median(steps), "min": steps[0], "max": steps[-1]},
            "ffn_gb_per_second": generation.metrics.ffn_bytes_per_token / statistics.median(steps) / 1e6,
            "time_to_first_token_ms": {"median": statistics.median(firsts), "min": firsts[0], "max": firsts[-1]},
        }
        memory[f"after_{mask}_generation"] = gpu_memory() - before
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpu = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    return result | {"onnxruntime": onnxruntime.__version__, "python": platform.python_version(), "gpu": gpu}


STEPS = {"make": make, "calibrate": calibrate, "build": build, "verify": verify, "run": run}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--step", choices=STEPS, help="Run one step alone (each step runs in a process of its own).")
    options = parser.parse_args()
    if options.step:
        print(json.dumps(STEPS[options.step](options.folder) or {}))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    for step in STEPS:
        command = [sys.executable, __file__, str(options.folder), "--step", step]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        report |= json.loads(result.stdout.splitlines()[-1])
        print(step, "done", file=sys.stderr)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
