"""Measure two defaults on calibration text: the pseudo-count of the prior, and refreshes.

    python benchmarks/choices.py prior [--model smollm2-135m] [--device cpu]
    python benchmarks/choices.py refresh ARTIFACT [--intervals 0 64 32 16 8] [--decays 1 0.9 0.5 0]

prior: masks of 70 % of the neurons and 40 % of up and down rows in every layer. For each pseudo-count, thresholds are
chosen on the blended scores. The prior of a prompt comes from the other sequences. Prompts have 256 and 32 tokens. In
PyTorch.

refresh: the artifact as built, with prompts of 256 tokens of the same text. Each row is one interval and one decay: the
bytes read, and the time of a token relative to that without refreshes, which is always measured. In ONNX Runtime.

Both print one JSON object a line. They score 128 tokens of each of 32 sequences of the built-in text. Give --sequences
and --dataset before `prior` or `refresh`.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rows import print_rows

from tda_export.calibration.corpus import BUILTIN, load_corpus
from tda_export.calibration.dense import blend, read_dense
from tda_export.calibration.kl_path import collect_estimates
from tda_export.calibration.marginals import EstimateHistogram, Level, score_thresholds
from tda_export.calibration.masked import choose_masking, down_weights, masked_kl, two_level_ffn
from tda_export.errors import TdaError, UsageError
from tda_export.evaluation.methods import Request, open_setting
from tda_export.evaluation.reference_data import require_gates
from tda_export.evaluation.text import TextSettings, evaluate_text
from tda_export.ffn_share import two_level_share
from tda_export.models.source import ModelSource, resolve_model
from tda_export.runtime import Model, load
from tda_export.runtime.deployment import Refresh

MASK_DENSITY, TOKEN_DENSITY = 0.7, 0.4
PSEUDO_COUNTS = (0, 16, 64, 256, 1024)
PROMPTS = (256, 32)  # short prompts depend most on the prior
CONTINUATION = 128
TIMED_PROMPTS = 4


def sequences(source: ModelSource, options: argparse.Namespace, length: int) -> torch.Tensor:
    """Return sequences of the calibration text, int64 [N, length]."""
    corpus = load_corpus(
        options.dataset,
        source.tokenizer,
        text_column=None,
        sequences=options.sequences,
        length=length,
        seed=options.seed,
        vocab_size=source.spec.vocab_size,
    )
    return corpus.tokens


def prior_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each prompt length and pseudo-count."""
    source = resolve_model(options.model, notify=lambda notice: print(notice, file=sys.stderr))
    spec = source.spec
    require_gates(spec)
    if options.sequences < 2:
        raise UsageError("A prior comes from other sequences. Give --sequences 2 or more.")
    model = source.reference(device=options.device)
    model.requires_grad_(False)
    down, matrices = down_weights(model, spec), len(spec.ffn_parts)
    for prompt in PROMPTS:
        tokens = sequences(source, options, prompt + CONTINUATION)
        dense = read_dense(model, spec, tokens, prompt)
        scale = up_scales(model, spec, tokens) * torch.stack([weight.float().norm(dim=0) for weight in down])
        for count in PSEUDO_COUNTS:
            blended = blend(dense, count)
            densities = torch.full((2, spec.num_layers), MASK_DENSITY, device=scale.device)
            densities[1] = TOKEN_DENSITY
            level = Level(score_thresholds(blended, densities[0]), torch.zeros(spec.num_layers, device=scale.device))
            for _ in range(2):  # the second pass has token thresholds, which change the inputs of later layers
                histogram = EstimateHistogram(spec.num_layers, scale.device)
                collect_estimates(model, spec, dense, blended, level, scale, down, histogram)
                level = Level(level.score_square, histogram.thresholds(densities[1]))
            kls, shares = [], []
            for sequence, statistic in zip(dense, blended, strict=True):
                masking = choose_masking(down, statistic, level.score_square, level.token, scale)
                read: list[float] = []

                def count_rows(layer: int, run: Any, masking: Any = masking, read: Any = read) -> None:
                    kept = float(masking.keep[layer].float().mean())
                    read.append(two_level_share(kept, float(run.survivors.float().mean()), matrices))

                with torch.no_grad(), two_level_ffn(model, spec, masking, count_rows):
                    kls.append(float(masked_kl(model, sequence)))
                shares.append(statistics.mean(read))
            yield {"prompt_tokens": prompt, "prior_tokens": count} | mean_kl(kls, statistics.mean(shares))


def up_scales(model: Any, spec: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the RMS of up_i · x over tokens, float32 [L, F]. The first token, an attention sink, is left out."""
    squares: dict[int, torch.Tensor] = {}
    handles = []
    for layer in range(spec.num_layers):

        def add(module: Any, inputs: Any, output: torch.Tensor, layer: int = layer) -> None:
            squares[layer] = squares.get(layer, 0) + output.float()[0, 1:].square().mean(dim=0)

        handles.append(model.get_submodule(spec.names.up.format(i=layer)).register_forward_hook(add))
    with torch.no_grad():
        for sequence in tokens:
            model(sequence[None].to(model.device))
    for handle in handles:
        handle.remove()
    return torch.stack([(squares[layer] / len(tokens)).sqrt() for layer in range(spec.num_layers)])


def mean_kl(kls: list[float], share: float) -> dict[str, float]:
    """Return the KL with its standard error, and the fraction of FFN bytes read."""
    return {"kl": statistics.mean(kls), "kl_stderr": statistics.stdev(kls) / math.sqrt(len(kls)), "ffn_share": share}


def refresh_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each interval and decay. Without refreshes the decay has no effect, and there is one row."""
    model = load(options.artifact, provider=options.provider)
    source = resolve_model(options.model or model.artifact.name)
    settings = TextSettings(options.sequences, PROMPTS[0], CONTINUATION)
    windows = sequences(source, options, settings.window).tolist()
    baseline = 0.0
    for interval, decay in itertools.product(sorted({0, *options.intervals}), options.decays):
        if not interval and decay != options.decays[0]:
            continue
        refresh = Refresh(interval, decay)
        request = Request(refresh=refresh)
        setting = open_setting(model.artifact, model.sessions, request)
        quality = asdict(evaluate_text(model.artifact, setting, windows, settings))
        seconds = token_seconds(model, windows, refresh)
        baseline = baseline or seconds
        yield {
            "interval": interval,
            "decay": decay,
            **{name: quality[name] for name in ("kl", "kl_stderr", "agreement")},
            "ffn_share": quality["ffn_bytes"] / quality["dense_ffn_bytes"],
            "refresh_share": quality["refresh_ffn_bytes"] / quality["dense_ffn_bytes"],
            "ms_per_token": 1000 * seconds,
            "time_ratio": seconds / baseline,
        }


def token_seconds(model: Model, windows: list[list[int]], refresh: Refresh) -> float:
    """Return the seconds of a token after the first, as the median over prompts."""
    how = model.artifact.deployment.with_refresh(refresh)
    rates = []
    for window in windows[: TIMED_PROMPTS + 1]:
        times = []
        for _ in model.generate(window[: PROMPTS[0]], max_new_tokens=CONTINUATION, deployment=how):
            times.append(time.perf_counter())
        if len(times) > 2:
            rates.append((times[-1] - times[0]) / (len(times) - 1))
    if not rates:
        raise TdaError("Every answer ended after a token or two, so there is nothing to time. Give another --dataset.")
    return statistics.median(rates[1:] or rates)  # the first prompt warms up


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what the defaults were chosen by.")
    parser.add_argument("--dataset", default=BUILTIN)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parts = parser.add_subparsers(dest="part", required=True)
    prior = parts.add_parser("prior")
    prior.add_argument("--model", default="smollm2-135m")
    prior.add_argument("--device", default="cpu")
    refresh = parts.add_parser("refresh")
    refresh.add_argument("artifact", type=Path)
    refresh.add_argument("--intervals", nargs="+", type=int, default=[0, 64, 32, 16, 8])
    refresh.add_argument("--decays", nargs="+", type=float, default=[1.0, 0.9, 0.5, 0.0])
    refresh.add_argument("--model", help="Model whose tokenizer reads the text.  [default: that of the artifact]")
    refresh.add_argument("--provider", default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    given = arguments()
    sys.exit(print_rows(prior_rows(given) if given.part == "prior" else refresh_rows(given)))
