"""The metrics of a generation."""

from __future__ import annotations

import itertools

import pytest

from tda_export.graph import contract
from tda_export.runtime import Model
from tda_export.runtime import generate as generate_module
from tests.runtime.conftest import (
    PROMPT,
    mask_alone,
    prompt_mask,
)

NEURONS = 3 * 96
BYTES_PER_NEURON = 3 * 64 * 4  # gate, up and down rows of 64 float32


def test_metrics_of_a_mask(model: Model) -> None:
    mask = prompt_mask(model, PROMPT)
    kept = sum(len(mask.inputs[contract.mask_indices(layer)].numpy()) for layer in range(3))
    generation = model.generate(PROMPT, max_new_tokens=3, deployment=mask_alone(model))
    list(generation)
    metrics = generation.metrics
    assert 0 < kept < NEURONS
    assert (metrics.provider, metrics.mask, metrics.finish_reason) == ("cpu", "tda", "length")
    assert (metrics.prompt_tokens, metrics.new_tokens) == (len(PROMPT), 3)
    assert metrics.density == pytest.approx(kept / NEURONS)
    assert metrics.sparsity == pytest.approx(1 - metrics.density)
    assert metrics.refreshes == 0
    assert metrics.bytes_per_token == kept * BYTES_PER_NEURON
    assert metrics.dense_bytes_per_token == NEURONS * BYTES_PER_NEURON


def test_metrics_expect_of_token_thresholds_what_the_calibration_does(model: Model) -> None:
    """A token reads the gate rows of its mask, and up and down rows for the fraction that survives."""
    mask, survivors = prompt_mask(model, PROMPT), model.artifact.manifest["survivors"]
    assert all(0 < share < 1 for share in survivors)
    read = sum(len(mask.indices(layer)) * (1 + 2 * survivors[layer]) * 64 * 4 for layer in range(3))
    generation = model.generate(PROMPT, max_new_tokens=3)
    list(generation)
    metrics = generation.metrics
    assert metrics.density == pytest.approx(mask.count(3) / NEURONS)
    assert metrics.bytes_per_token == pytest.approx(read, abs=1)
    assert metrics.sparsity == pytest.approx(1 - read / (NEURONS * BYTES_PER_NEURON))


def test_metrics_of_dense(model: Model) -> None:
    generation = model.generate(PROMPT, mask="dense", max_new_tokens=3)
    list(generation)
    metrics = generation.metrics
    assert (metrics.mask, metrics.density, metrics.sparsity) == ("dense", 1.0, 0.0)
    assert metrics.bytes_per_token == metrics.dense_bytes_per_token == NEURONS * BYTES_PER_NEURON


def test_rate_starts_at_the_second_token(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that ticks each time it is read: 1 s for prefill and for each later step."""

    class Clock:
        ticks = itertools.count()

        def perf_counter(self) -> float:
            return float(next(self.ticks))

    monkeypatch.setattr(generate_module, "time", Clock())
    generation = model.generate(PROMPT, max_new_tokens=5)
    seconds = []
    for _ in generation:
        seconds.append((generation.metrics.decode_seconds, generation.metrics.decode_tokens_per_second))
    assert seconds == [(0.0, None), (1.0, 1.0), (2.0, 1.0), (3.0, 1.0), (4.0, 1.0)]
    assert generation.metrics.time_to_first_token == 1.0
