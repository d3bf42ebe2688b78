"""Measure other methods on a text beside `tda-export eval`: static masks, CATS, Deja Vu's predictors, MoEfication.

    python benchmarks/baselines.py TEXT [--model smollm2-135m] [--sparsity 0.3 0.5 0.7] [--prompts 32] [--json]

TEXT is a UTF-8 file that calibration has not read. Windows, protocol and JSON keys are those of `tda-export eval` on an
artifact of the same model. All methods run in PyTorch, float32, on the CPU. They are fitted to the built-in calibration
text (or --dataset): 32 sequences of 384 tokens, drawn as by `tda-export calibrate`.

- static: the neurons of each layer with the largest scores over the whole text, the same for every prompt;
- cats: neurons with |act(gate · x)| above a quantile of the layer; reads every gate row, and so saves at most 2/3;
- dejavu: a low-rank predictor for each layer, trained here; the bytes of the predictor count (`predictor_bytes`);
- moe-true, moe: MoEfication, experts of 32 neurons chosen by their true activation (an upper bound) or by a router.

Sparsity is the fraction of FFN bytes to skip; `ffn_bytes` are the bytes that were read. A method that cannot reach a
sparsity is left out, with the reason on standard error. About ten minutes for SmolLM2-135M on two cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch

from tda_export.calibration.corpus import BUILTIN, load_corpus
from tda_export.errors import TdaError, UsageError
from tda_export.evaluation.predictor import PredictorSettings
from tda_export.evaluation.reference_data import ffn_inputs
from tda_export.evaluation.reference_fit import MethodName, Wanted, check_wanted, fit_methods
from tda_export.evaluation.reference_methods import ReferenceMethod, measure_methods
from tda_export.evaluation.text import TextQuality, TextSettings, cut_windows
from tda_export.models.source import ModelSource, resolve_model
from tda_export.progress import progress

CALIBRATION_LENGTH = 384  # tokens of a sequence, the default of calibrate


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure static masks, CATS and Deja Vu's predictors on a text.")
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", nargs="+", choices=get_args(MethodName), default=list(get_args(MethodName)))
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.3, 0.5, 0.7])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=384)
    parser.add_argument("--continuation-tokens", type=int, default=128)
    parser.add_argument("--dataset", default=BUILTIN, help="Text to fit the methods to, as for calibrate.")
    parser.add_argument("--sequences", type=int, default=32, help="Sequences of that text.")
    parser.add_argument("--rank", type=int, default=64, help="Rank of the predictors.")
    parser.add_argument("--epochs", type=int, default=5, help="Epochs of their training.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="Print one JSON object a line, and no progress.")
    return parser.parse_args(given)


def reachable(source: ModelSource, settings: PredictorSettings, options: argparse.Namespace) -> list[Wanted]:
    """List the methods and sparsities that can be measured. Print why the others cannot."""
    wanted: list[Wanted] = []
    for one in itertools.starmap(Wanted, itertools.product(options.methods, options.sparsity)):
        try:
            check_wanted(one, source.spec, settings)
            wanted.append(one)
        except UsageError as error:
            print(f"{one.method} at sparsity {one.sparsity} is left out: {error}", file=sys.stderr)
    return wanted


def read_calibration_text(model: Any, source: ModelSource, options: argparse.Namespace) -> list[torch.Tensor]:
    """Return the inputs of each layer's FFN on the calibration text: L tensors, float32 [T, M]."""
    corpus = load_corpus(
        options.dataset,
        source.tokenizer,
        text_column=None,
        sequences=options.sequences,
        length=CALIBRATION_LENGTH,
        seed=options.seed,
        vocab_size=source.spec.vocab_size,
    )
    with progress("Reading the calibration text", len(corpus.tokens), quiet=options.json) as advance:
        return ffn_inputs(model, source.spec, corpus.tokens, advance)


def row(one: Wanted, method: ReferenceMethod, quality: TextQuality, options: argparse.Namespace) -> dict[str, Any]:
    """Return a result with the keys of `tda-export eval --json`."""
    return {
        "model": options.model,
        "dtype": "float32",
        "provider": "pytorch",
        "method": one.method,
        "budget": {"sparsity": one.sparsity},
        "text": options.text.name,
        "prompt_tokens": options.prompt_tokens,
        "continuation_tokens": options.continuation_tokens,
        **asdict(quality),
        "predictor_bytes": method.extra_bytes,
    }


def line(result: dict[str, Any]) -> str:
    """Return a line of the table."""
    read = result["ffn_bytes"] / result["dense_ffn_bytes"]
    own = result["predictor_bytes"] / result["dense_ffn_bytes"]
    return (
        f"{result['method']:8} {result['budget']['sparsity']:8.3f} {read:9.3f} {own:9.3f} {result['density']:7.3f}   "
        f"{result['kl']:.4f} ± {result['kl_stderr']:.4f}   {result['perplexity']:8.3f} ± "
        f"{result['perplexity_stderr']:.3f}   {result['agreement']:.4f} ± {result['agreement_stderr']:.4f}"
    )


class Baselines:
    """Methods that are fitted to the calibration text when they are first measured, for any number of texts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.source = resolve_model(options.model, notify=lambda notice: print(notice, file=sys.stderr))
        self.training = PredictorSettings(rank=options.rank, epochs=options.epochs, seed=options.seed)
        self.wanted = reachable(self.source, self.training, options)
        if not self.wanted:
            raise UsageError("Nothing is left to measure. Give another --sparsity.")
        self.model = self.source.reference()
        self.inputs = read_calibration_text(self.model, self.source, options)
        self.methods: dict[Wanted, ReferenceMethod] = {}

    def fit(self, wanted: list[Wanted]) -> dict[Wanted, ReferenceMethod]:
        """Fit the methods that are not fitted yet."""
        if new := [one for one in wanted if one not in self.methods]:
            with progress("Fitting", len(self.inputs), quiet=self.options.json) as advance:
                spec = self.source.spec
                self.methods |= fit_methods(self.model, spec, self.inputs, new, self.training, advance)
        return {one: self.methods[one] for one in wanted}

    def measure(
        self, text: str, name: str, prompt_tokens: int, wanted: list[Wanted] | None = None
    ) -> list[dict[str, Any]]:
        """Measure methods (by default all of the options) on a text, with prompts of one length."""
        options = argparse.Namespace(**vars(self.options) | {"text": Path(name), "prompt_tokens": prompt_tokens})
        settings = TextSettings(options.prompts, prompt_tokens, options.continuation_tokens)
        tokenizer = self.source.tokenizer
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        windows = cut_windows(tokens, tokenizer("").input_ids, settings)
        methods = self.fit(wanted or self.wanted)
        with progress("Evaluating", len(windows), quiet=options.json) as advance:
            qualities = measure_methods(self.model, self.source.spec, windows, settings, methods, advance)
        return [row(one, method, qualities[one], options) for one, method in methods.items()]


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Fit, measure, and return the results."""
    if not options.text.is_file():
        raise UsageError(f"{options.text}: no such file. Give a UTF-8 text file.")
    try:
        text = options.text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TdaError(f"{options.text}: not valid UTF-8 text. Convert it to UTF-8.") from error
    return Baselines(options).measure(text, options.text.name, options.prompt_tokens)


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
    first = results[0]
    print(f"dense perplexity {first['dense_perplexity']:.3f} ± {first['dense_perplexity_stderr']:.3f}")
    print("method   sparsity FFN bytes predictor density   KL (nats a token)   perplexity          top-1 agreement")
    for result in results:
        print(line(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
