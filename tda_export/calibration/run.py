"""The calibration run: prices of rows and their table, or the curves of every layer and the KL path, or both."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
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
from tda_export.calibration.magnitudes import row_norms
from tda_export.calibration.price_file import Priced
from tda_export.calibration.price_run import PriceSettings, Show, begin_priced, check_sequences, price_rows
from tda_export.calibration.resume import PartialFile
from tda_export.errors import UsageError
from tda_export.models.placement import AUTO, own_memory
from tda_export.models.quantised import kept_of
from tda_export.models.source import ModelSource
from tda_export.models.spec import DecoderSpec
from tda_export.packing import PACKINGS, HeadRows, Packing, chosen_head, row_bytes_of
from tda_export.progress import Advance
from tda_export.ranks import ALONE, Ranks
from tda_export.versions import installed_versions

CalibrationMethod = Literal["priced", "tda", "all"]
CalibrationDtype = Literal["fp32", "fp16", "bf16"]
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
RECORDED_PACKAGES = ("torch", "transformers", "datasets", "tokenizers")
SAVE_SECONDS = 5.0  # least time between two saves of curves; one takes milliseconds


@dataclass(frozen=True)
class CalibrationSettings:
    """How to calibrate. Lengths in tokens; a sequence is `prompt_tokens` and then `continuation_tokens`.

    `labels` (per token), `packings`, `head` and `refine_steps` are for priced rows; `estimator`, `curves_only` and
    `prior_tokens` for prompt masks (tda). `head` None prices the head's rows wherever its format allows it.
    """

    estimator: Estimator = "prompt"
    sequences: int = 64
    prompt_tokens: int = 256
    continuation_tokens: int = 128
    seed: int = 0
    dtype: CalibrationDtype = "fp32"
    device: str = "cpu"
    curves_only: bool = False
    prior_tokens: int = 64
    method: CalibrationMethod = "priced"
    labels: int = 2
    packings: tuple[Packing, ...] = PACKINGS
    head: HeadRows | None = None
    refine_steps: int = 0

    def __post_init__(self) -> None:
        if self.prompt_tokens < 2:
            raise UsageError("--prompt-tokens must be at least 2: the first token does not count.")
        if self.continuation_tokens < 1:
            raise UsageError("--continuation-tokens must be at least 1.")
        if self.priced and self.continuation_tokens < 2:
            raise UsageError(
                "--continuation-tokens must be at least 2 for prices: a token is priced by those after it."
            )
        if self.priced:
            check_sequences(self.sequences)
        if self.masks and not self.curves_only:
            KlPlan(self.sequences)  # refuses too few
        check_device(self.device)
        if self.device == AUTO and self.masks:
            raise UsageError("--device auto calibrates prices only. Give --method priced, or --device cuda.")
        if self.dtype == "fp16" and (self.device == "cpu" or (self.device == AUTO and not torch.cuda.device_count())):
            raise UsageError("--dtype fp16 on the CPU is slow and imprecise. Use fp32, or --device cuda.")

    @property
    def priced(self) -> bool:
        """Whether rows are priced."""
        return self.method != "tda"

    @property
    def masks(self) -> bool:
        """Whether prompt masks are calibrated: curves, and the KL path unless `curves_only`."""
        return self.method != "priced"

    @property
    def length(self) -> int:
        """The tokens of a sequence."""
        return self.prompt_tokens + self.continuation_tokens

    def describe(self) -> dict[str, Any]:
        """Return the settings that the method uses, as plain data."""
        unused = set() if self.priced else {"labels", "packings", "head", "refine_steps"}
        unused |= set() if self.masks else {"estimator", "curves_only", "prior_tokens"}
        content = {name: value for name, value in asdict(self).items() if name not in unused}
        return content | ({"packings": list(self.packings)} if self.priced else {})


def check_device(device: str) -> None:
    """Refuse a --device that is unknown or not available.

    Raises:
        UsageError: The device is unknown or not available.
    """
    kind, _, number = device.partition(":")
    if device == AUTO:
        return
    if device != "cpu" and (kind != "cuda" or (":" in device and not number.isdecimal())):
        raise UsageError(f"--device {device} is not known. Use cpu, cuda, cuda:N or auto.")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count() or "no"
        raise UsageError(f"--device {device}: PyTorch finds {found} CUDA GPU here. Use --device cpu.")


def load_reference(source: ModelSource, dtype: torch.dtype, device: str, ranks: Ranks) -> Any:
    """Load a model in PyTorch on the device of --device: this rank's GPU, or spread over its share of the machine."""
    memory = own_memory(ranks.local_number, ranks.local_count) if device == AUTO else None
    return source.reference(dtype=dtype, device=ranks.own_device(device), memory=memory)


def accumulate_curves(
    model: Any,
    spec: DecoderSpec,
    tokens: torch.Tensor,
    settings: CalibrationSettings,
    advance: Advance = lambda units: None,
    *,
    resume: CurveSums | None = None,
    save: Callable[[CurveSums], None] = lambda sums: None,
    ranks: Ranks = ALONE,
) -> tuple[torch.Tensor, CurveSums]:
    """Run the sequences through the model and add up the curves.

    Args:
        model: A transformers model in evaluation mode.
        spec: Its architecture.
        tokens: int64 [N, P + C].
        settings: Estimator and lengths are used here.
        advance: Called with the number of sequences added to the sums.
        resume: Sums of the first sequences, from an interrupted run.
        save: Called with the sums of whole sequences from time to time (`SAVE_SECONDS`).
        ranks: The ranks that share the sequences.

    Returns:
        The threshold grid, float32 [K], and the sums.
    """
    grid = threshold_grid()

    def begin() -> CurveAccumulator:
        return CurveAccumulator(spec.num_layers, spec.ffn_size, grid, settings.estimator, settings.prompt_tokens)

    def add(sequence: torch.Tensor, together: int) -> CurveSums:
        own = begin()
        with torch.inference_mode(), capture_activations(model, spec, own.add, own.add_up):
            model.base_model(sequence[None].to(model.device), use_cache=False)  # [1, P + C]
        return own.sums

    sums = resume or begin().sums
    done = int(sums.sequences)
    if done:
        advance(done)
    saved = time.monotonic()
    for found in ranks.in_order(list(tokens)[done:], add):
        sums = sums.merge(found)
        advance(1)
        if time.monotonic() - saved >= SAVE_SECONDS:
            save(sums)
            saved = time.monotonic()
    return grid, sums


def calibrate(
    source: ModelSource,
    corpus: Corpus,
    settings: CalibrationSettings,
    budget: dict[str, Any],
    *,
    show: Show,
    output: Path | None = None,
    ranks: Ranks = ALONE,
) -> Calibration:
    """Calibrate a model on a corpus.

    Args:
        source: The model.
        corpus: Sequences of `settings.length` tokens.
        settings: How to calibrate.
        budget: The requested budget, as plain data; `build` takes it as its default.
        show: Opens the progress display of a step, given its description and number of units.
        output: The file that will be written. The state that an interrupted run left next to it is reused
            (`resume.PartialFile`). Only the first rank writes there.
        ranks: The ranks that share the sequences; all return the same result.

    Returns:
        Prices, curves, KL path and provenance, ready to be written.

    Raises:
        UsageError: The corpus has fewer than two sequences, but prices or a KL path are to be found; or the model's
            codes do not allow the wanted head.
    """
    plan = plan_for(source.spec, len(corpus.tokens)) if settings.masks and not settings.curves_only else None
    if settings.priced:
        check_sequences(len(corpus.tokens))
        settings = replace(settings, head=chosen_head(settings.head, source.formats, source.name))
    about = {
        "model": {
            "name": source.name,
            "architecture": source.spec.architecture,
            "fingerprint": ranks.from_first(lambda: source.fingerprint),
            "ffn_matrices": len(source.spec.ffn_parts),
            **({} if source.quantisation is None else {"quantization": kept_of(source.quantisation)}),
        },
        "dataset": corpus.describe(),
        "settings": settings.describe(),
    }
    versions = {"tda-export": tda_export.__version__, **installed_versions(RECORDED_PACKAGES)}
    partial = PartialFile(output, about | {"versions": versions}) if output and ranks.first else None
    earlier = ranks.from_first(lambda: partial.load() if partial and settings.masks else None)
    model = load_reference(source, TORCH_DTYPES[settings.dtype], settings.device, ranks)
    priced = _price(model, source, corpus, settings, show, partial, ranks) if settings.priced else None
    sums, sweep = earlier or (None, None)
    save = partial.save if partial else lambda sums, sweep=None: None
    if settings.masks and (sums is None or int(sums.sequences) < len(corpus.tokens)):
        with show("Calibrating", len(corpus.tokens)) as advance:
            sums = accumulate_curves(
                model, source.spec, corpus.tokens, settings, advance, resume=sums, save=save, ranks=ranks
            )[1]
        save(sums)
    table = None
    if plan and sums is not None:
        scales = neuron_scales(model, source.spec, sums)
        with show("Allocating", plan.units(source.spec.num_layers)) as advance:
            table = find_path(
                model,
                source.spec,
                corpus.tokens,
                settings.prompt_tokens,
                scales,
                prior_tokens=settings.prior_tokens,
                seed=settings.seed,
                advance=advance,
                resume=sweep.to(model.device) if sweep else None,
                save=lambda sweep: save(sums, sweep),
                ranks=ranks,
            )
    provenance = {**about, "budget": budget, "versions": versions}
    return Calibration(threshold_grid(), sums, provenance, table, priced)


def _price(
    model: Any,
    source: ModelSource,
    corpus: Corpus,
    settings: CalibrationSettings,
    show: Show,
    partial: PartialFile | None,
    ranks: Ranks,
) -> Priced:
    spec = source.spec
    head = settings.head == "priced"
    row_bytes = row_bytes_of(spec, ELEMENT_BYTES[settings.dtype], source.formats, head=head)
    packings = [packing for packing in settings.packings if row_bytes.suits(spec, packing)]
    if not packings:
        raise UsageError(
            f"{source.name}: linears that read the same input have different formats, or columns that are not "
            "whole groups, and cannot lie side by side. Calibrate with --packing separate."
        )
    how = PriceSettings(
        settings.prompt_tokens,
        settings.labels,
        settings.seed,
        packings,
        corpus.prefix_tokens,
        head,
        settings.refine_steps,
    )
    begun = begin_priced(spec, how, row_norms(model, spec), row_bytes, settings.continuation_tokens)
    return price_rows(
        model,
        spec,
        corpus.tokens,
        how,
        begun,
        show=show,
        resume=ranks.from_first(lambda: partial.load_priced(begun) if partial else None),
        save=partial.save_priced if partial else lambda priced: None,
        ranks=ranks,
    )
