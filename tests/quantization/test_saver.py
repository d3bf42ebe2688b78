"""Layers that are saved while the next one is quantised."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from tda_export.errors import TdaError
from tda_export.quantization.resume import LayerSaver, PartialLayers
from tda_export.weights.formats import integer_format
from tda_export.weights.integers import PackedCodes, round_to_nearest

FORMAT = integer_format(4)


def layer_codes(seed: int) -> dict[str, PackedCodes]:
    rows = np.random.default_rng(seed).standard_normal((3, 40)).astype(np.float32)
    return {f"layers.{seed}.o": PackedCodes.of(round_to_nearest(rows, FORMAT))}


def test_all_layers_are_there_at_the_end(tmp_path: Path) -> None:
    layers = PartialLayers(tmp_path / "out", {})
    with LayerSaver(layers) as saver:
        for layer in range(3):
            saver.save(layer, layer_codes(layer))
    for layer in range(3):
        (name, packed), *_ = layer_codes(layer).items()
        found = layers.load(layer, {name: (FORMAT, (3, 40))})
        assert found is not None
        assert all(np.array_equal(*pair) for pair in zip(found[name].pack(), packed.tensors, strict=True))


def test_the_caller_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = threading.Event()
    monkeypatch.setattr(PartialLayers, "save", lambda *_: goes_on.wait(60))
    with LayerSaver(PartialLayers(tmp_path / "out", {})) as saver:
        saver.save(0, layer_codes(0))
        assert not goes_on.is_set()
        goes_on.set()


@pytest.mark.parametrize("when", ["at the next layer", "at the end", "beside another error"])
def test_an_error_is_raised(when: str, tmp_path: Path) -> None:
    (tmp_path / "out.partial").write_text("no folder")
    saver = LayerSaver(PartialLayers(tmp_path / "out", {}))

    def work() -> None:
        with saver:
            saver.save(0, layer_codes(0))
            if when == "at the next layer":
                saver.save(1, layer_codes(1))
                raise AssertionError("the first layer's error was lost")
            if when == "beside another error":
                raise ValueError("another")

    with pytest.raises(TdaError, match="The quantisation has stopped") as raised:
        work()
    assert "out.partial" in str(raised.value)
