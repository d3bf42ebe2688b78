"""Compare four-bit stacks on the CPU in one run, taking turns: same model, same length of context, batch 1.

    python benchmarks/cpu_peers.py FOLDER --llama LLAMA_CPP_BIN [--model smollm2-135m | --shape qwen2.5-0.5b]
        [--artifact INT4_ARTIFACT] [--depth 1024] [--rounds 6]

- llama.cpp, Q4_0, with or without flash attention, whichever is faster. The head has four bits (`llama-quantize
  --pure`), or the default of `llama-quantize`. LLAMA_CPP_BIN is the folder of its `llama-bench` and
  `llama-quantize`. The source distribution of llama-cpp-python holds llama.cpp: `pip download --no-deps --no-binary
  llama-cpp-python llama-cpp-python`, unpack, and in its vendor/llama.cpp `cmake -B build -DCMAKE_BUILD_TYPE=Release
  -DLLAMA_CURL=OFF && cmake --build build --target llama-bench llama-quantize`.
- ONNX Runtime GenAI, int4 in blocks of 32, head included, int8 arithmetic (accuracy level 4), made by its own builder.
- Ours: an artifact of four-bit priced rows, dense and at 0.7 and 0.5 of the rows' bytes. For --shape, artifacts of
  random weights are made here (`bench/artifact.py`): with the default int8 head and with a head of four bits, each with
  keys and values as floats of 32 and 16 bits and in 8. llama.cpp keeps them as floats of 16 bits, GenAI of 32.

Each round times all stacks, one after another. Prints one JSON object: milliseconds of a token and of a prompt of
--depth tokens, as medians with ranges, and the speed-up over the fastest peer in the same round, and over the fastest
peer with a head of as many bits. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

TOKENS = 32  # tokens timed in a round
HEAD_4, HEAD_8 = "head int4", "head int8"
HEADS: tuple[tuple[str, list[str]], ...] = ((HEAD_8, []), (HEAD_4, ["head=int4"]))  # with build's --weights-for
PEERS = (f"llama.cpp Q4_0, {HEAD_4}", f"llama.cpp Q4_0, {HEAD_8}", f"GenAI int4, {HEAD_4}")
SPARSITIES = (0.3, 0.5)
GGUF_TYPE = "Q4_0"


def hugging_face(options: argparse.Namespace) -> Path:
    """Write the float32 model folder that peers are converted from."""
    folder = options.folder / "model"
    if (folder / "config.json").is_file():
        return folder
    if options.shape:
        import torch

        from tda_export.bench.random_model import write_random_model
        from tda_export.bench.shapes import random_source

        config = random_source(options.shape).config
        config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
        return write_random_model(config, folder, dtype=torch.float32)
    from tda_export.models.source import resolve_model

    source = resolve_model(options.model)
    source.reference().save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
    return folder


def genai_folder(options: argparse.Namespace, model: Path) -> Path:
    folder: Path = options.folder / "genai"
    if not (folder / "genai_config.json").is_file():
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", model, "-o", folder]
        command += ["-p", "int4", "-e", "cpu", "-c", options.folder / "cache"]
        command += ["--extra_options", "block_size=32", "accuracy_level=4"]
        subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr)
    return folder


def write_gguf(model: Path, path: Path) -> None:
    """Write the weights of a Hugging Face folder as GGUF without a vocabulary, float16, in their own order.

    llama.cpp's converter permutes rows of q and k. That changes neither the time nor the quantisation of a row.
    """
    import gguf
    from transformers import AutoConfig

    from tda_export.models.weights import open_safetensors

    config, weights = AutoConfig.from_pretrained(model), open_safetensors(model)
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    if config.model_type == "llama":
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    for name, target in gguf_names(config, weights.names).items():
        array = weights.load(name).float().numpy()
        writer.add_tensor(target, array if array.ndim == 1 else array.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_names(config: Any, names: Iterable[str]) -> dict[str, str]:
    """Return GGUF's name of each tensor of a Llama or Qwen2 checkpoint."""
    import gguf

    architecture = gguf.MODEL_ARCH.LLAMA if config.model_type == "llama" else gguf.MODEL_ARCH.QWEN2
    known = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    found = {name: known.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    missing = [name for name, target in found.items() if target is None]
    if missing:
        raise SystemExit(f"{missing[0]}: GGUF has no name for it.")
    return found


def gguf_file(options: argparse.Namespace, model: Path, *, pure: bool) -> Path:
    """Write the weights as GGUF, and let llama.cpp quantise them."""
    quantised: Path = options.folder / f"model-{GGUF_TYPE}{'' if pure else '-default'}.gguf"
    if quantised.is_file():
        return quantised
    unquantised = options.folder / "model-f16.gguf"
    if not unquantised.is_file():
        write_gguf(model, unquantised)
    command = [options.llama / "llama-quantize", *["--pure"] * pure, unquantised, quantised, GGUF_TYPE]
    subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr, stderr=sys.stderr)
    return quantised


def llama_bench(options: argparse.Namespace, model: Path) -> Callable[[], tuple[float, float]]:
    """Return a function that times one round: seconds of a token, and of a prompt."""
    command = [options.llama / "llama-bench", "-m", model, "-t", options.threads, "-r", 1, "-fa", "0,1", "-o", "json"]

    def run(*arguments: Any) -> float:
        words = [str(word) for word in (*command, *arguments)]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return max(float(row["avg_ts"]) for row in json.loads(done.stdout))

    def measure() -> tuple[float, float]:
        decode = run("-p", 0, "-n", TOKENS, "-d", options.depth)
        return 1 / decode, options.depth / run("-p", options.depth, "-n", 0)

    return measure


def timed(read: Callable[[], object], steps: Callable[[int], object]) -> tuple[float, float]:
    """Return the seconds of a token, and of a prompt to its last logits; llama-bench too has a warm-up before each.

    `steps` decodes as many tokens as it is told.
    """
    read()
    started = time.perf_counter()
    read()
    first = time.perf_counter() - started
    steps(1)
    started = time.perf_counter()
    steps(TOKENS)
    return (time.perf_counter() - started) / TOKENS, first


def genai(options: argparse.Namespace, folder: Path, prompt: list[int]) -> Callable[[], tuple[float, float]]:
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    model = og.Model(config)
    parameters = og.GeneratorParams(model)
    length = len(prompt) + TOKENS + 2
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)

    def measure() -> tuple[float, float]:
        generators = [og.Generator(model, parameters) for _ in range(2)]  # the first one warms up
        unread = iter(generators)

        def steps(count: int) -> None:
            for _ in range(count):
                generators[-1].generate_next_token()

        return timed(lambda: next(unread).append_tokens(prompt), steps)

    return measure


def ours(
    label: str, artifact: Path, prices: dict[str, float], prompt: list[int]
) -> dict[str, Callable[[], tuple[float, float]]]:
    from tda_export.bench.priced import PricedRunner
    from tda_export.runtime.artifact import open_artifact
    from tda_export.runtime.session import Sessions

    opened = open_artifact(artifact)
    sessions = Sessions(opened, "cpu")
    if not sessions.native:
        raise SystemExit("The native library is not in use, so nothing was timed.")

    def measuring(price: float) -> Callable[[], tuple[float, float]]:
        runner = PricedRunner(opened, sessions, len(prompt) + TOKENS + 2, price)

        def measure() -> tuple[float, float]:
            return timed(lambda: runner.prefill(prompt), runner.steps)

        return measure

    return {f"ours {name}, {label}": measuring(price) for name, price in prices.items()}


def our_artifacts(options: argparse.Namespace, model: Path) -> dict[str, tuple[Path, dict[str, float]]]:
    """Return artifacts named by cache and head, each with a price for each fraction of the rows' bytes."""
    from tda_export.runtime.artifact import open_artifact

    if options.artifact:
        from tda_export.deployments import chosen_price
        from tda_export.weights.plan import EMBEDDING, HEAD

        opened = open_artifact(options.artifact)
        prices = {f"{1 - share:.2f}": chosen_price(opened, sparsity=share).price for share in SPARSITIES}
        matrices = opened.manifest["matrices"]
        head = matrices[HEAD if HEAD in matrices else EMBEDDING]["format"].partition("_")[0]  # EMBEDDING is a tied head
        cache = "" if opened.shape.kv == "float" else f"KV {opened.shape.kv}, "
        return {f"{cache}head {head}": (options.artifact, {"1.00": 0.0} | prices)}
    from tda_export.bench.artifact import build_random_priced
    from tda_export.graph.storage import read_plan, storage_of
    from tda_export.models.source import resolve_model

    found = {}
    for label, rule, kv in (
        *((head, rule, "float") for head, rule in HEADS),
        *((f"KV {kv}, {head}", rule, kv) for kv in ("float16", "int8") for head, rule in HEADS),
    ):
        folder = options.folder / f"artifact-head-{options.head}-{label.replace(', ', '-').replace(' ', '-')}"
        known = folder.with_suffix(".prices.json")
        if not known.is_file():
            source = resolve_model(str(model))
            storage = storage_of(source, "float32", read_plan(source, "int4", None, [*rule, *options.weights_for]))
            _, drawn = build_random_priced(source, folder, storage, SPARSITIES, kv=kv, head=options.head, quiet=True)
            known.write_text(json.dumps({f"{1 - share:.2f}": price for share, price in drawn.items()}))
        found[label] = folder, {"1.00": 0.0} | json.loads(known.read_text())
    return found


def times_faster(times: dict[str, list[tuple[float, float]]], peers: Sequence[str], name: str) -> float | None:
    """Return the fastest peer's time for a token over one's own: the median over all rounds but the first."""
    if not peers:
        return None
    rounds = range(1, len(times[name]))
    return statistics.median(min(times[peer][i][0] for peer in peers) / times[name][i][0] for i in rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llama", type=Path, required=True, help="folder of llama-bench and llama-quantize")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--head", choices=["priced", "whole"], default="priced", help="rows of our heads")
    parser.add_argument("--shape", help="random weights of a name of tda_export.bench.shapes instead of --model")
    parser.add_argument("--artifact", type=Path, help="artifact of --model with four bits and a table of prices")
    parser.add_argument("--weights-for", action="append", default=[], help="as for build, for the artifacts made here")
    parser.add_argument("--depth", type=int, default=1024, help="tokens of context")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prepare-only", action="store_true")
    parser.add_argument("--skip", action="append", default=[], help="leave out stacks whose name has this; repeatable")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    model = hugging_face(options)
    ggufs = gguf_file(options, model, pure=True), gguf_file(options, model, pure=False)
    genai_model, artifacts = genai_folder(options, model), our_artifacts(options, model)
    if options.prepare_only:
        return
    prompt = [3 + i * 7919 % 250 for i in range(options.depth)]
    measures = [*(llama_bench(options, file) for file in ggufs), genai(options, genai_model, prompt)]
    ways = dict(zip(PEERS, measures, strict=True))
    for label, (artifact, prices) in artifacts.items():
        ways |= ours(label, artifact, prices, prompt)
    ways = {name: way for name, way in ways.items() if not any(part in name for part in options.skip)}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(1 + options.rounds):
        for name, measure in reversed(list(ways.items())) if number % 2 else ways.items():
            times[name].append(measure())
            print(f"{number} {name}: {1e3 * times[name][-1][0]:.2f} ms a token", file=sys.stderr, flush=True)
    report: dict[str, Any] = {"model": options.shape or options.model, "depth": options.depth, "tokens": TOKENS}
    for name, measured in times.items():
        decode, prefill = zip(*measured[1:], strict=True)
        peers = [peer for peer in PEERS if peer in times]
        same_head = [peer for peer in peers if peer.split(", ")[-1] == name.split(", ")[-1]]
        report[name] = {
            "ms_per_token": 1e3 * statistics.median(decode),
            "ms_per_token_range": [1e3 * min(decode), 1e3 * max(decode)],
            "prefill_ms": 1e3 * statistics.median(prefill),
            "times_faster_than_best_peer": times_faster(times, peers, name),
            "times_faster_with_the_same_head": times_faster(times, same_head, name),
        }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
