"""Measure other methods on a text beside `tda-export eval`: static masks, CATS, and Deja Vu's predictors.

    python benchmarks/baselines.py TEXT [--model smollm2-135m] [--sparsity 0.3 0.5 0.7] [--prompts 32] [--json]

TEXT is a UTF-8 file that calibration has not seen. The windows of it and the protocol are those of `tda-export eval`
on an artifact of the same model, and so are the keys of the JSON; it runs in PyTorch, float32, on the CPU. Everything
is fitted to the built-in calibration text (or --dataset), 32 sequences of 384 tokens as `tda-export calibrate` draws
them:

- static: each layer's neurons of the largest scores over the whole text, the same for every prompt;
- cats: |act(gate · x)| against a layer's quantile; reads every gate row, and so saves at most 2/3;
- dejavu: a low-rank predictor a layer, trained here; what it reads itself counts, and is shown as `predictor_bytes`.

Sparsity is the share of FFN bytes that is not read, as asked for; `ffn_bytes` is what was read. A method that cannot
reach one is left out, and why is said on standard error. About ten minutes for SmolLM2-135M on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tda_export.calibration.cett import neuron_scores
from tda_export.calibration.corpus import BUILTIN, load_corpus
from tda_export.errors import TdaError, UsageError
from tda_export.evaluation.predictor import (
    Predictor,
    PredictorMethod,
    PredictorSettings,
    predictor_density,
    train_predictor,
)
from tda_export.evaluation.reference_data import ffn_inputs, layer_activations
from tda_export.evaluation.reference_methods import (
    CatsMethod,
    ReferenceMethod,
    cats_threshold,
    measure_methods,
    static_method,
)
from tda_export.evaluation.text import TextQuality, TextSettings, cut_windows
from tda_export.graph.method import kept_neurons
from tda_export.models.source import ModelSource, resolve_model
from tda_export.progress import progress

METHODS = ("static", "cats", "dejavu")
CALIBRATION_LENGTH = 384  # tokens of a sequence, as calibrate's defaults have it

Key = tuple[str, float]  # method, sparsity


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure static masks, CATS and Deja Vu's predictors on a text.")
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.3, 0.5, 0.7])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=384)
    parser.add_argument("--continuation-tokens", type=int, default=128)
    parser.add_argument("--dataset", default=BUILTIN, help="What the methods are fitted to, as calibrate takes it.")
    parser.add_argument("--sequences", type=int, default=32, help="Sequences of it.")
    parser.add_argument("--rank", type=int, default=64, help="Of the predictors.")
    parser.add_argument("--epochs", type=int, default=5, help="Of their training.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="Print one JSON object a line, and no progress.")
    options = parser.parse_args(given)
    for sparsity in options.sparsity:
        if not 0 <= sparsity < 1:
            raise UsageError(f"Sparsity {sparsity} is outside [0, 1). Give fractions such as 0.5.")
    return options


def reachable(source: ModelSource, options: argparse.Namespace) -> list[Key]:
    """List what can be measured; say why the rest cannot."""
    keys: list[Key] = []
    for method in options.methods:
        for sparsity in options.sparsity:
            try:
                if method == "cats":
                    cats_threshold(torch.zeros(1, 1), sparsity)
                if method == "dejavu":
                    predictor_density(source.spec, sparsity, options.rank)
                keys.append((method, sparsity))
            except UsageError as error:
                print(f"{method} at sparsity {sparsity} is left out: {error}", file=sys.stderr)
    return keys


def fit(model: Any, source: ModelSource, keys: list[Key], options: argparse.Namespace) -> dict[Key, ReferenceMethod]:
    """Fit every method to the calibration text, layer by layer."""
    spec = source.spec
    corpus = load_corpus(
        options.dataset,
        source.tokenizer,
        text_column=None,
        sequences=options.sequences,
        length=CALIBRATION_LENGTH,
        seed=options.seed,
    )
    with progress("Reading the calibration text", len(corpus.tokens), quiet=options.json) as advance:
        inputs = ffn_inputs(model, spec, corpus.tokens, advance)
    settings = PredictorSettings(rank=options.rank, epochs=options.epochs, seed=options.seed)
    predicted = {key: predictor_density(spec, key[1], options.rank) for key in keys if key[0] == "dejavu"}
    prior: list[torch.Tensor] = []
    thresholds: dict[Key, list[float]] = {key: [] for key in keys if key[0] == "cats"}
    predictors: dict[Key, list[Predictor]] = {key: [] for key in predicted}
    epochs = spec.num_layers * len(predicted) * options.epochs
    with progress("Training predictors", max(epochs, 1), quiet=options.json or not epochs) as advance:
        for layer, x in enumerate(inputs):
            activations = layer_activations(model, spec, layer, x)
            prior.append(neuron_scores(activations.relative))
            for key, chosen in thresholds.items():
                chosen.append(cats_threshold(activations.activated, key[1]))
            for key, density in predicted.items():
                predictors[key].append(train_predictor(x, activations.relative, density, settings, advance))
    methods: dict[Key, ReferenceMethod] = {
        key: static_method(torch.stack(prior), key[1]) for key in keys if key[0] == "static"
    }
    methods |= {key: CatsMethod(chosen) for key, chosen in thresholds.items()}
    for key, density in predicted.items():
        methods[key] = PredictorMethod(predictors[key], kept_neurons(density, spec.ffn_size))
    return methods


def row(key: Key, method: ReferenceMethod, quality: TextQuality, options: argparse.Namespace) -> dict[str, Any]:
    """One result, with the keys of `tda-export eval --json`."""
    return {
        "model": options.model,
        "dtype": "float32",
        "provider": "pytorch",
        "method": key[0],
        "budget": {"sparsity": key[1]},
        "text": options.text.name,
        "prompt_tokens": options.prompt_tokens,
        "continuation_tokens": options.continuation_tokens,
        **asdict(quality),
        "predictor_bytes": method.extra_bytes,
    }


def line(result: dict[str, Any]) -> str:
    """One line of the table."""
    read = result["ffn_bytes"] / result["dense_ffn_bytes"]
    own = result["predictor_bytes"] / result["dense_ffn_bytes"]
    return (
        f"{result['method']:7} {result['budget']['sparsity']:8.3f} {read:9.3f} {own:9.3f} {result['density']:7.3f}   "
        f"{result['kl']:.4f} ± {result['kl_stderr']:.4f}   {result['perplexity']:8.3f} ± "
        f"{result['perplexity_stderr']:.3f}   {result['agreement']:.4f} ± {result['agreement_stderr']:.4f}"
    )


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Fit, measure, and return the results."""
    if not options.text.is_file():
        raise UsageError(f"{options.text}: no such file. Give a UTF-8 text file.")
    settings = TextSettings(options.prompts, options.prompt_tokens, options.continuation_tokens)
    source = resolve_model(options.model, notify=lambda notice: print(notice, file=sys.stderr))
    tokenizer = source.tokenizer
    tokens = tokenizer(options.text.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    windows = cut_windows(tokens, tokenizer("").input_ids, settings)
    keys = reachable(source, options)
    model = source.reference()
    methods = fit(model, source, keys, options)
    with progress("Evaluating", len(windows), quiet=options.json) as advance:
        qualities = measure_methods(model, source.spec, windows, settings, methods, advance)
    return [row(key, methods[key], qualities[key], options) for key in keys]


def main() -> int:
    try:
        options = arguments()
        results = run(options)
    except TdaError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    if options.json:
        for result in results:
            print(json.dumps(result))
        return 0
    if results:
        first = results[0]
        print(f"dense perplexity {first['dense_perplexity']:.3f} ± {first['dense_perplexity_stderr']:.3f}")
    print("method  sparsity FFN bytes predictor density   KL (nats a token)   perplexity          top-1 agreement")
    for result in results:
        print(line(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
