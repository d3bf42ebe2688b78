"""The calibration run: one forward pass a sequence gives the curves of every layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

import tda_export
from tda_export.calibration.capture import capture_activations
from tda_export.calibration.cett import threshold_grid
from tda_export.calibration.corpus import Corpus
from tda_export.calibration.curves import CurveAccumulator, CurveSums, Estimator
from tda_export.calibration.file import Calibration
from tda_export.errors import UsageError
from tda_export.models.source import ModelSource
from tda_export.models.spec import DecoderSpec
from tda_export.progress import Advance
from tda_export.versions import installed_versions

CalibrationDtype = Literal["fp32", "fp16", "bf16"]
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RECORDED_PACKAGES = ("torch", "transformers", "datasets", "tokenizers")


@dataclass(frozen=True)
class CalibrationSettings:
    """How to calibrate. Lengths in tokens; a sequence is `prompt_tokens` and then `continuation_tokens`."""

    estimator: Estimator = "prompt"
    sequences: int = 32
    prompt_tokens: int = 256
    continuation_tokens: int = 128
    seed: int = 0
    dtype: CalibrationDtype = "fp32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.prompt_tokens < 2:
            raise UsageError("--prompt-tokens must be at least 2: the first token does not count.")
        if self.continuation_tokens < 1:
            raise UsageError("--continuation-tokens must be at least 1.")
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
) -> tuple[torch.Tensor, CurveSums]:
    """Run the sequences through the model and add up the curves.

    Args:
        model: A transformers model in evaluation mode.
        spec: Its architecture.
        tokens: int64 [N, P + C].
        settings: Estimator and lengths are used here.
        advance: Called with 1 after each sequence.

    Returns:
        The threshold grid, float32 [K], and the sums.
    """
    grid = threshold_grid()
    accumulator = CurveAccumulator(spec.num_layers, spec.ffn_size, grid, settings.estimator, settings.prompt_tokens)
    with torch.inference_mode(), capture_activations(model, spec, accumulator.add, accumulator.add_up):
        for sequence in tokens:
            model.base_model(sequence[None].to(model.device), use_cache=False)  # [1, P + C]
            advance(1)
    return grid, accumulator.sums


def calibrate(
    source: ModelSource, corpus: Corpus, settings: CalibrationSettings, budget: dict[str, Any], advance: Advance
) -> Calibration:
    """Calibrate a model on a corpus.

    Args:
        source: The model.
        corpus: Sequences of `settings.length` tokens.
        settings: How.
        budget: The budget that was asked for, as plain data; build takes it as its default.
        advance: Called with 1 after each sequence.

    Returns:
        Curves and provenance, ready to be written.
    """
    model = source.reference(dtype=TORCH_DTYPES[settings.dtype], device=settings.device)
    grid, sums = accumulate_curves(model, source.spec, corpus.tokens, settings, advance)
    provenance = {
        "model": {"name": source.name, "architecture": source.spec.architecture, "fingerprint": source.fingerprint},
        "dataset": corpus.describe(),
        "settings": asdict(settings),
        "budget": budget,
        "versions": {"tda-export": tda_export.__version__, **installed_versions(RECORDED_PACKAGES)},
    }
    return Calibration(grid, sums, provenance)
