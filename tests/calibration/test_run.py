"""The settings of a calibration run and its record."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

import tda_export
from tda_export.calibration.corpus import Corpus
from tda_export.calibration.run import CalibrationSettings, calibrate
from tda_export.errors import UsageError
from tda_export.models.source import resolve_model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_tokens": 1}, r"^--prompt-tokens must be at least 2: the first token does not count\.$"),
        ({"continuation_tokens": 0}, r"^--continuation-tokens must be at least 1\.$"),
        ({"dtype": "fp16"}, r"^--dtype fp16 on the CPU is slow and imprecise\. Use fp32, or --device cuda\.$"),
    ],
)
def test_invalid_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CalibrationSettings(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^--device cuda: PyTorch finds no CUDA GPU here\. Use --device cpu\.$"):
        CalibrationSettings(device="cuda")


def test_smallest_settings_are_allowed() -> None:
    assert CalibrationSettings(prompt_tokens=2, continuation_tokens=1).length == 3


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_calibration_records_where_it_came_from(tiny_model: Any, dtype: Any) -> None:
    source = resolve_model(str(tiny_model))
    corpus = Corpus(torch.arange(24).reshape(2, 12), "some.txt", "0" * 64)
    settings = CalibrationSettings(prompt_tokens=8, continuation_tokens=4, sequences=2, dtype=dtype)
    steps: list[int] = []
    calibration = calibrate(source, corpus, settings, {"cett": 0.2}, steps.append)
    assert steps == [1, 1]
    assert calibration.model_fingerprint == source.fingerprint
    provenance = calibration.provenance
    assert provenance["model"]["architecture"] == "LlamaForCausalLM"
    assert provenance["dataset"] == {"name": "some.txt", "sequences": 2, "tokens_sha256": "0" * 64}
    assert provenance["settings"] == asdict(settings)
    assert provenance["budget"] == {"cett": 0.2}
    assert provenance["versions"]["tda-export"] == tda_export.__version__
    assert "torch" in provenance["versions"]
    assert calibration.sums.mean_cett.isfinite().all()
    assert calibration.sums.sequences.tolist() == [2]
