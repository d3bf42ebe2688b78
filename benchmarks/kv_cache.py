"""Compare ways to store keys and values with floats: the KL, and the time of a step.

    python benchmarks/kv_cache.py FLOAT OTHER .. --text valid.txt --contexts 512 4096 --windows 4
    python benchmarks/kv_cache.py FLOAT OTHER .. --text valid.txt --contexts 1024 4096 --time
    python benchmarks/kv_cache.py --shape llama-3-8b --weights int4 --contexts 1024 8192 32768 --time

FLOAT and the others are artifacts of one model of the layout `priced`, built with --kv float, and with float16 or int8.
With --shape they are made of random weights, and deleted afterwards (TMPDIR): float16 on CUDA, where FLOAT is float16.
Contexts are read densely, and the tokens after them are decoded at price 0. KL is to FLOAT over --tokens tokens after
each context, with its standard error over windows, which follow one another in the text. With --time all take turns of
16 steps at each length of context. The first turn is left out, and milliseconds are medians over turns with the
smallest and the largest. With --sparsity, at most two of them, those of a shape also take their turns where so many of
the linears' bytes are not read. Without --text the built-in texts are repeated. Prints one JSON object a context.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tda_export.bench.priced import PricedRunner
from tda_export.bench.timing import Spread, take_turns
from tda_export.calibration.corpus import builtin_folder
from tda_export.graph import kv_formats
from tda_export.graph.derive import artifact_spec
from tda_export.graph.sizes import artifact_sizes
from tda_export.runtime import Model, load
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import decode
from tda_export.runtime.priced import PricedPrefill
from tda_export.runtime.providers import cuda_problem
from tda_export.temporary import owned_folder

STEPS = 16  # steps of a turn


def log_probabilities(model: Model, context: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
    """Read a context, then `tokens`, and return the log-probabilities after each of the tokens, float64 [C, V]."""
    shape, sessions = model.artifact.shape, model.sessions
    cache = KvCache(shape, sessions.provider, len(context) + len(tokens))
    PricedPrefill(sessions, shape, cache).read(context)
    logits = decode(sessions, cache, tokens, None, sessions.dense_inputs).astype(np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def divergence(models: Sequence[Model], text: list[int], context: int, options: Any) -> dict[str, Any]:
    window, others = context + options.tokens, [model.artifact.shape.kv for model in models[1:]]
    if len(text) < window * options.windows:
        raise SystemExit(f"The text has {len(text)} tokens, and {options.windows} windows take {window} each.")
    found: dict[str, list[tuple[float, float]]] = {kv: [] for kv in others}  # KL and agreement of each window
    for start in range(0, window * options.windows, window):
        tokens = text[start : start + window]
        floats, *stored = (log_probabilities(model, tokens[:context], tokens[context:]) for model in models)
        for kv, other in zip(others, stored, strict=True):
            kl = (np.exp(floats) * (floats - other)).sum(axis=1).mean()
            found[kv].append((float(kl), float((floats.argmax(axis=1) == other.argmax(axis=1)).mean())))
    result: dict[str, Any] = {"context": context, "windows": options.windows, "tokens": options.tokens}
    for kv, windows in found.items():
        kl, agreed = np.array(windows).T
        error = float(np.std(kl, ddof=1) / np.sqrt(len(kl))) if len(kl) > 1 else None
        result[kv] = {"kl": float(kl.mean()), "kl_stderr": error, "agreement": float(agreed.mean())}
    return result


def times(models: Sequence[Model], text: list[int], context: int, options: Any) -> dict[str, Any]:
    room = context + STEPS * (options.turns + 1)
    prices = {"": 0.0} | {f" {sparsity:g}": price for sparsity, price in options.prices.items()}
    runners = {}
    for model in models:
        for name, price in prices.items():
            runner = PricedRunner(model.artifact, model.sessions, room, price)
            runner.prefill(text[:context])
            runners[model.artifact.shape.kv + name] = runner
    spent = take_turns({name: partial(runner.steps, STEPS) for name, runner in runners.items()}, options.turns + 1)
    result: dict[str, Any] = {"context": context, "turns": options.turns, "steps": STEPS}
    for model in models:
        sizes = artifact_sizes(artifact_spec(model.artifact), model.artifact)
        for name in prices:
            spread = Spread.of([1e3 * seconds / STEPS for seconds in spent[model.artifact.shape.kv + name][1:]])
            result[model.artifact.shape.kv + name] = {
                "ms": spread.median,
                "ms_range": [spread.smallest, spread.largest],
                "cache_bytes": sizes.cache(context),
            }
    return result


def build(options: Any, folder: Path) -> list[Path]:
    """Build the artifacts of a shape, with the same random weights."""
    from tda_export.bench.artifact import build_random_priced
    from tda_export.bench.random_codes import random_storage
    from tda_export.bench.shapes import random_source
    from tda_export.graph.storage import read_plan

    on_gpu = options.provider == "cuda" or (options.provider == "auto" and cuda_problem() is None)
    source = random_source(options.shape)
    plan = read_plan(source, options.weights or "float", None, ())
    storage = random_storage("float16" if on_gpu else "float32", plan)
    formats = [kv for kv in kv_formats.KV_FORMATS if not (on_gpu and kv == kv_formats.KV_FLOAT16)]
    for kv in formats:
        sparsities = options.sparsity or (0.5,)
        _, prices = build_random_priced(source, folder / kv, storage, sparsities, kv=kv, head=options.head, quiet=True)
        options.prices = prices if options.sparsity else {}
    return [folder / kv for kv in formats]


def text_of(model: Model, options: Any) -> list[int]:
    """Return the tokens of the text, or as many of the built-in texts as the longest context needs."""
    if options.text:
        return model.text.encode(options.text.read_text(encoding="utf-8"))
    files = sorted(builtin_folder().glob("*.txt"))
    tokens = model.text.encode("\n\n".join(file.read_text(encoding="utf-8") for file in files))
    windows = 1 if options.time else options.windows
    return list(itertools.islice(itertools.cycle(tokens), (max(options.contexts) + options.tokens) * windows))


def measure(folders: Sequence[Path | str], options: Any) -> None:
    models = [load(folder, provider=options.provider) for folder in folders]
    found = [model.artifact.shape.kv for model in models]
    if found[0] != kv_formats.KV_FLOAT or len({*found}) != len(found):
        raise SystemExit(f"Keys and values are in {' and '.join(found)}. Give float first, then others, each once.")
    text = text_of(models[0], options)
    for context in options.contexts:
        print(json.dumps((times if options.time else divergence)(models, text, context, options)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="*", metavar="FLOAT OTHER", help="built with --kv float, and others")
    parser.add_argument("--shape", help="instead of artifacts: random weights of this model's shape")
    parser.add_argument("--weights", choices=["float", "int8", "int4"], help="how --shape stores them (default: float)")
    parser.add_argument("--head", choices=["priced", "whole"], default="priced", help="rows of our heads")
    parser.add_argument("--provider", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--sparsity", type=float, nargs="+", metavar="SHARE", help="with --shape and --time")
    options = parser.parse_args()
    options.prices = {}  # by sparsity
    if bool(options.shape) == (len(options.artifacts) > 1) or len(options.artifacts) == 1:
        parser.error("give FLOAT and at least one other artifact, or --shape.")
    if options.weights and not options.shape:
        parser.error("--weights needs --shape: artifacts have their weights already.")
    if options.sparsity and not (options.shape and options.time and len(options.sparsity) < 3):
        parser.error("--sparsity takes at most two shares, with --shape and --time.")
    if not options.shape:
        return measure(options.artifacts, options)
    with owned_folder(Path(tempfile.gettempdir()), "tda-export-kv-cache") as folder:
        measure(build(options, folder), options)


if __name__ == "__main__":
    main()
