"""Keys and values of 8 bits beside floats: what they cost in KL, and the time of a step with each.

    python benchmarks/kv_cache.py FLOAT INT8 --text valid.txt --contexts 512 4096 --windows 4
    python benchmarks/kv_cache.py FLOAT INT8 --text valid.txt --contexts 1024 4096 --time

FLOAT and INT8 are artifacts of one model of the layout `priced`, built with --kv float and --kv int8. Contexts are read
densely, and what follows is decoded at price 0. KL is that of INT8 to FLOAT over --tokens tokens after each context,
with its standard error over windows, which follow one another in the text. With --time both take turns of 16 steps at
each length of context, the first one left out; milliseconds are medians over turns, with the smallest and the largest.
Prints one JSON object a context.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tda_export.bench.priced import PricedRunner
from tda_export.bench.timing import Spread, take_turns
from tda_export.graph import contract
from tda_export.graph.derive import artifact_spec
from tda_export.graph.sizes import artifact_sizes
from tda_export.runtime import Model, load
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import decode
from tda_export.runtime.priced import PricedPrefill

STEPS = 16  # of a turn


def log_probabilities(model: Model, context: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
    """Read a context, and return the log-probabilities of what follows each of `tokens`, float64 [C, V]."""
    shape, sessions = model.artifact.shape, model.sessions
    cache = KvCache(shape, sessions.provider, len(context) + len(tokens))
    PricedPrefill(sessions, shape, cache).read(context)
    logits = decode(sessions, cache, tokens, None, sessions.dense_inputs).astype(np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def divergence(models: Sequence[Model], text: list[int], context: int, options: Any) -> dict[str, Any]:
    window, found, agreed = context + options.tokens, [], []
    if len(text) < window * options.windows:
        raise SystemExit(f"The text has {len(text)} tokens, and {options.windows} windows take {window} each.")
    for start in range(0, window * options.windows, window):
        tokens = text[start : start + window]
        dense, codes = (log_probabilities(model, tokens[:context], tokens[context:]) for model in models)
        found.append(float((np.exp(dense) * (dense - codes)).sum(axis=1).mean()))
        agreed.append(float((dense.argmax(axis=1) == codes.argmax(axis=1)).mean()))
    return {
        "context": context,
        "windows": options.windows,
        "tokens": options.tokens,
        "kl": float(np.mean(found)),
        "kl_stderr": float(np.std(found, ddof=1) / np.sqrt(len(found))) if len(found) > 1 else None,
        "agreement": float(np.mean(agreed)),
    }


def times(models: Sequence[Model], text: list[int], context: int, options: Any) -> dict[str, Any]:
    room = context + STEPS * (options.turns + 1)
    runners = {}
    for model in models:
        runner = PricedRunner(model.artifact, model.sessions, room, 0.0)
        runner.prefill(text[:context])
        runners[model.artifact.shape.kv] = runner
    spent = take_turns({name: partial(steps, runner) for name, runner in runners.items()}, options.turns + 1)
    result: dict[str, Any] = {"context": context, "turns": options.turns, "steps": STEPS}
    for model in models:
        spread = Spread.of([1e3 * seconds / STEPS for seconds in spent[model.artifact.shape.kv][1:]])
        sizes = artifact_sizes(artifact_spec(model.artifact), model.artifact)
        result[model.artifact.shape.kv] = {
            "ms": spread.median,
            "ms_range": [spread.smallest, spread.largest],
            "cache_bytes": sizes.cache(context),
        }
    return result


def steps(runner: PricedRunner) -> None:
    for _ in range(STEPS):
        runner.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("float", help="artifact built with --kv float")
    parser.add_argument("int8", help="artifact built with --kv int8")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--turns", type=int, default=8)
    options = parser.parse_args()
    models = [load(options.float), load(options.int8)]
    found = [model.artifact.shape.kv for model in models]
    if found != list(contract.KV_FORMATS):
        raise SystemExit(f"Keys and values of the artifacts are {' and '.join(found)}; give float, then int8.")
    text = models[0].text.encode(options.text.read_text(encoding="utf-8"))
    for context in options.contexts:
        print(json.dumps((times if options.time else divergence)(models, text, context, options)), flush=True)


if __name__ == "__main__":
    main()
