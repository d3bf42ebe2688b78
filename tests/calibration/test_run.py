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


@pytest.mark.parametrize("device", ["gpu", "", "mps", "CUDA", "cuda:", "cuda:one", "cuda:-1", "cuda:0:1", "cpu:0"])
def test_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(UsageError, match=rf"^--device {device} is not known\. Use cpu, cuda or cuda:N\.$"):
        CalibrationSettings(device=device)


@pytest.mark.parametrize(
    ("gpus", "device", "found"),
    [(0, "cuda", "no"), (0, "cuda:0", "no"), (1, "cuda:1", "1"), (2, "cuda:2", "2"), (2, "cuda:10", "2")],
)
def test_device_that_is_not_there_is_refused(
    gpus: int, device: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    message = rf"^--device {device}: PyTorch finds {found} CUDA GPU here\. Use --device cpu\.$"
    with pytest.raises(UsageError, match=message):
        CalibrationSettings(device=device)


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:0", "cuda:1"])
def test_device_that_is_there_is_taken(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert CalibrationSettings(device=device).device == device


def test_half_precision_is_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert CalibrationSettings(device="cuda", dtype="fp16").dtype == "fp16"


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
