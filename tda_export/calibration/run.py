"""The calibration run: one forward pass a sequence gives the curves of every layer, and a sweep the KL path."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import tda_export
from tda_export.calibration.capture import capture_activations
from tda_export.calibration.cett import threshold_grid
from tda_export.calibration.corpus import Corpus
from tda_export.calibration.curves import CurveAccumulator, CurveSums, Estimator
from tda_export.calibration.file import Calibration
from tda_export.calibration.kl_plan import KlPlan, plan_for
from tda_export.calibration.kl_run import find_path, neuron_scales
from tda_export.calibration.resume import PartialFile
from tda_export.errors import UsageError
from tda_export.models.source import ModelSource
from tda_export.models.spec import DecoderSpec
from tda_export.progress import Advance
from tda_export.versions import installed_versions

CalibrationDtype = Literal["fp32", "fp16", "bf16"]
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RECORDED_PACKAGES = ("torch", "transformers", "datasets", "tokenizers")
SAVE_SECONDS = 5.0  # least time between two saves of curves; one takes milliseconds


@dataclass(frozen=True)
class CalibrationSettings:
    """How to calibrate. Lengths in tokens; a sequence is `prompt_tokens` and then `continuation_tokens`."""

    estimator: Estimator = "prompt"
    sequences: int = 64
    prompt_tokens: int = 256
    continuation_tokens: int = 128
    seed: int = 0
    dtype: CalibrationDtype = "fp32"
    device: str = "cpu"
    curves_only: bool = False
    prior_tokens: int = 64

    def __post_init__(self) -> None:
        if self.prompt_tokens < 2:
            raise UsageError("--prompt-tokens must be at least 2: the first token does not count.")
        if self.continuation_tokens < 1:
            raise UsageError("--continuation-tokens must be at least 1.")
        if not self.curves_only:
            KlPlan(self.sequences)  # refuses too few
        _check_device(self.device)
        if self.device == "cpu" and self.dtype == "fp16":
            raise UsageError("--dtype fp16 on the CPU is slow and imprecise. Use fp32, or --device cuda.")

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.continuation_tokens


def _check_device(device: str) -> None:
    kind, _, number = device.partition(":")
    if device != "cpu" and (kind != "cuda" or (":" in device and not number.isdecimal())):
        raise UsageError(f"--device {device} is not known. Use cpu, cuda or cuda:N.")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count() or "no"
        raise UsageError(f"--device {device}: PyTorch finds {found} CUDA GPU here. Use --device cpu.")


def accumulate_curves(
    model: Any,
    spec: DecoderSpec,
    tokens: torch.Tensor,
    settings: CalibrationSettings,
    advance: Advance = lambda units: None,
    *,
    resume: CurveSums | None = None,
    save: Callable[[CurveSums], None] = lambda sums: None,
) -> tuple[torch.Tensor, CurveSums]:
    """Run the sequences through the model and add up the curves.

    Args:
        model: A transformers model in evaluation mode.
        spec: Its architecture.
        tokens: int64 [N, P + C].
        settings: Estimator and lengths are used here.
        advance: Told of sequences that are in the sums.
        resume: Sums of the first sequences, from a run that was interrupted; they are added to in place.
        save: Given the sums of whole sequences from time to time (`SAVE_SECONDS`).

    Returns:
        The threshold grid, float32 [K], and the sums.
    """
    grid = threshold_grid()
    accumulator = CurveAccumulator(
        spec.num_layers, spec.ffn_size, grid, settings.estimator, settings.prompt_tokens, resume
    )
    done = int(accumulator.sums.sequences)
    if done:
        advance(done)
    saved = time.monotonic()
    with torch.inference_mode(), capture_activations(model, spec, accumulator.add, accumulator.add_up):
        for sequence in tokens[done:]:
            model.base_model(sequence[None].to(model.device), use_cache=False)  # [1, P + C]
            advance(1)
            if time.monotonic() - saved >= SAVE_SECONDS:
                save(accumulator.sums)
                saved = time.monotonic()
    return grid, accumulator.sums


def calibrate(
    source: ModelSource,
    corpus: Corpus,
    settings: CalibrationSettings,
    budget: dict[str, Any],
    *,
    show: Callable[[str, int], AbstractContextManager[Advance]],
    output: Path | None = None,
) -> Calibration:
    """Calibrate a model on a corpus.

    Args:
        source: The model.
        corpus: Sequences of `settings.length` tokens.
        settings: How.
        budget: The budget that was asked for, as plain data; build takes it as its default.
        show: Opens the progress of a step, given its description and its units.
        output: The file to come; what an interrupted run left beside it is used again (`resume.PartialFile`).

    Returns:
        Curves, KL path and provenance, ready to be written.

    Raises:
        UsageError: The corpus has fewer than two sequences, and a KL path is to be found.
    """
    plan = None if settings.curves_only else plan_for(source.spec, len(corpus.tokens))
    about = {
        "model": {
            "name": source.name,
            "architecture": source.spec.architecture,
            "fingerprint": source.fingerprint,
            "ffn_matrices": len(source.spec.ffn_parts),
        },
        "dataset": corpus.describe(),
        "settings": asdict(settings),
    }
    versions = {"tda-export": tda_export.__version__, **installed_versions(RECORDED_PACKAGES)}
    partial = PartialFile(output, about | {"versions": versions}) if output else None
    earlier = partial.load(settings.device) if partial else None
    model = source.reference(dtype=TORCH_DTYPES[settings.dtype], device=settings.device)
    sums, sweep = earlier or (None, None)
    save = partial.save if partial else lambda sums, sweep=None: None
    if sums is None or int(sums.sequences) < len(corpus.tokens):
        with show("Calibrating", len(corpus.tokens)) as advance:
            sums = accumulate_curves(
                model, source.spec, corpus.tokens, settings, advance, resume=sums, save=lambda sums: save(sums)
            )[1]
        save(sums)
    table = None
    if plan:
        with show("Allocating", plan.units(source.spec.num_layers)) as advance:
            table = find_path(
                model,
                source.spec,
                corpus.tokens,
                settings.prompt_tokens,
                neuron_scales(model, source.spec, sums),
                prior_tokens=settings.prior_tokens,
                seed=settings.seed,
                advance=advance,
                resume=sweep,
                save=lambda sweep: save(sums, sweep),
            )
    provenance = {**about, "budget": budget, "versions": versions}
    return Calibration(threshold_grid(), sums, provenance, table)
