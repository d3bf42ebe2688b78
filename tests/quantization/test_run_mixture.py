"""A quantisation that chooses which linears are int8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from tda_export.calibration.corpus import Corpus
from tda_export.errors import TdaError, UsageError
from tda_export.models.source import ModelSource
from tda_export.quantization import resume, run
from tda_export.quantization.resume import PartialLayers
from tda_export.quantization.run import quantize
from tda_export.quantization.settings import Quantizer, QuantizeSettings
from tda_export.weights.plan import read_rules
from tests.calibration.shown import Shown
from tests.quantization.test_run import CORPUS, SETTINGS, Interruption, finished, interrupt

MIXED = QuantizeSettings(**{**vars(SETTINGS), "bits_per_weight": 6.0, "rules": read_rules(["layers.1.*=int4"])})


def mean_bits(codes: Any) -> float:
    """Return the mean bits of the layers' linears, from the stored bytes."""
    linears = [found for name, found in codes.items() if name.startswith("layers.")]
    stored = sum(array.nbytes for found in linears for array in found.pack())
    return 8 * stored / sum(found.codes.size for found in linears)


@pytest.mark.parametrize("quantizer", ["gptq", "rtn"])
def test_some_linears_are_int8(quantizer: Quantizer, tiny: ModelSource) -> None:
    settings, show = QuantizeSettings(**{**vars(MIXED), "quantizer": quantizer}), Shown()
    found = quantize(tiny, CORPUS, settings, show=show)
    assert show.bars[1] == ["Estimating losses", 6, 6]
    formats = {name: format.name for name, format in found.plan.integers.items() if name.startswith("layers.")}
    assert {format for name, format in formats.items() if name.startswith("layers.1.")} == {"int4_g32"}
    assert set(formats.values()) == {"int4_g32", "int8_g32"}
    assert {name: codes.format for name, codes in found.codes.items()} == found.plan.integers
    used = {"gptq": 2, "rtn": 4}[quantizer]  # GPTQ keeps some of its 3 for Hessians; 1 of 5 is held out
    mean = mean_bits(found.codes)
    assert 5.7 < mean <= 6
    assert found.about["mixture"] == {
        "most_bits_per_weight": 6.0,
        "bits_per_weight": pytest.approx(mean),
        "sequences": used,
        "labels": 4,
    }


def test_more_bits_lose_less(tiny: ModelSource) -> None:
    tokens = torch.randint(3, 259, (48, 64), generator=torch.Generator().manual_seed(1))
    kls = []
    for bits in (4.75, 6.0, 8.0):
        settings = QuantizeSettings(
            sequences=32, kl_sequences=16, prompt_tokens=32, continuation_tokens=32, bits_per_weight=bits
        )
        found = quantize(tiny, Corpus(tokens, "some.txt", "0" * 64), settings, show=Shown())
        assert found.loss is not None
        kls.append(found.loss.kl)
    assert kls == sorted(kls, reverse=True)


def test_estimated_losses_are_kept(tiny: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted run does not estimate again, and gives the same folder. Other bits use the same losses."""
    mixed = {"bits_per_weight": 6.0}
    expected = finished(tiny, tmp_path / "whole", **mixed)
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        with pytest.raises(Interruption):
            finished(tiny, tmp_path / "out", **mixed)
    losses = tmp_path / "out.partial" / "losses.safetensors"
    assert losses.is_file()
    other = finished(tiny, tmp_path / "other", bits_per_weight=5.0)
    with monkeypatch.context() as patch:
        patch.setattr(run, "linear_losses", None)
        assert finished(tiny, tmp_path / "out", **mixed) == expected
        assert finished(tiny, tmp_path / "out", bits_per_weight=5.0) == other
        with pytest.raises(TypeError):  # other settings need new losses
            finished(tiny, tmp_path / "out", **mixed, symmetric=True)
    losses.write_bytes(losses.read_bytes()[:-5])
    assert finished(tiny, tmp_path / "out", **mixed) == expected
    partial = PartialLayers(tmp_path / "out", {})
    partial.check()
    partial.remove()
    assert not partial.folder.exists()


def test_losses_that_cannot_be_kept(tiny: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_the_disk(*arguments: Any, **options: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(resume, "save_file", fill_the_disk)
    message = (
        r"losses\.safetensors: could not be written \(No space left on device\)\. .* The quantisation has stopped\.$"
    )
    with pytest.raises(TdaError, match=message):
        quantize(tiny, CORPUS, MIXED, show=Shown(), output=tmp_path / "out")


def test_bits_of_another_format() -> None:
    message = (
        r"^--bits-per-weight stores some linears in int4 and others in int8, and has no effect with --weights int8\."
    )
    with pytest.raises(UsageError, match=message):
        QuantizeSettings(weights="int8", bits_per_weight=6.0)
