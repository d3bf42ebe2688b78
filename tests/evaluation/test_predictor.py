"""Predictors of neurons: learning, bytes, and reproducible training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tda_export.errors import UsageError
from tda_export.evaluation.predictor import (
    Predictor,
    PredictorMethod,
    PredictorSettings,
    largest,
    predictor_density,
    train_predictor,
)
from tda_export.evaluation.reference_methods import sparse_ffn
from tda_export.models.source import ModelSource

HIDDEN, NEURONS, RANK = 16, 40, 4
SETTINGS = PredictorSettings(rank=RANK, epochs=20, batch_tokens=64)


def learnable(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs of very different scales around a mean, and magnitudes from a map of rank 4."""
    fixed = torch.Generator().manual_seed(0)
    directions = torch.randn(HIDDEN, RANK, generator=fixed) @ torch.randn(RANK, NEURONS, generator=fixed)
    standard = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))
    scale, mean = torch.logspace(-2, 2, HIDDEN), torch.linspace(-5, 5, HIDDEN)
    return standard * scale + mean, (standard @ directions).sigmoid()


def recall(chosen: torch.Tensor, relative: torch.Tensor, kept: int) -> float:
    best = largest(relative, kept)
    return float((chosen & best).sum() / best.sum())


def test_learns_what_a_map_of_its_rank_decides() -> None:
    x, relative = learnable(2000, seed=1)
    predictor = train_predictor(x, relative, 0.25, SETTINGS)
    new_x, new_relative = learnable(500, seed=2)
    static = largest(largest(relative, 10).float().mean(dim=0)[None], 10)
    assert recall(static.expand(500, -1), new_relative, 10) < 0.5
    assert recall(largest(predictor.logits(new_x), 10), new_relative, 10) > 0.9


def test_training_repeats_and_depends_on_the_seed() -> None:
    x, relative = learnable(300, seed=1)
    one, two = (train_predictor(x, relative, 0.5, SETTINGS) for _ in range(2))
    other = train_predictor(x, relative, 0.5, PredictorSettings(RANK, 20, 64, seed=1))
    for name in ("first", "second", "bias"):
        assert torch.equal(getattr(one, name), getattr(two, name))
        assert not torch.equal(getattr(one, name), getattr(other, name))


def test_inputs_and_neurons_that_never_change_do_no_harm() -> None:
    x, relative = learnable(200, seed=1)
    x[:, 3] = 7.0
    relative[:, 5], relative[:, 6] = 2.0, -1.0
    predictor = train_predictor(x, relative, 0.25, SETTINGS)
    logits = predictor.logits(x)
    assert logits.isfinite().all()
    assert (logits[:, 5] > logits[:, 6]).all()


def test_a_token_reads_the_rows_of_the_largest_logits(reference: Any, source: ModelSource) -> None:
    """The slow way: compute all neurons, and add the outputs of those with the largest logits."""
    generator = torch.Generator().manual_seed(4)
    predictors = [
        Predictor(*(torch.randn(shape, generator=generator) for shape in ((64, 2), (2, 96), (96,)))) for _ in range(3)
    ]
    method, x, mlp = (
        PredictorMethod(predictors, 24),
        torch.randn(5, 64, generator=generator),
        reference.model.layers[0].mlp,
    )
    with sparse_ffn(reference, source.spec, method) as count, torch.inference_mode():
        y = mlp(x[None])[0]
        h = mlp.act_fn(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)
        for token in range(5):
            scores = [float(x[token] @ predictors[0].first @ column) for column in predictors[0].second.T]
            best = sorted(range(96), key=lambda i: -(scores[i] + float(predictors[0].bias[i])))[:24]
            torch.testing.assert_close(y[token], mlp.down_proj.weight[:, best] @ h[token, best], rtol=1e-4, atol=1e-4)
    assert count.shares == (0.25, 0.25, 0.25)
    assert method.extra_bytes == 4 * 3 * (64 * 2 + 2 * 96 + 96)


def test_keeping_every_neuron_is_dense_exactly(reference: Any, source: ModelSource) -> None:
    predictor = Predictor(torch.ones(64, 1), torch.ones(1, 96), torch.zeros(96))
    tokens = torch.arange(3, 20)[None]
    with torch.inference_mode():
        dense = reference(tokens).logits
        with sparse_ffn(reference, source.spec, PredictorMethod([predictor] * 3, 96)):
            assert torch.equal(reference(tokens).logits, dense)


def test_rows_and_predictors_together_keep_to_the_sparsity(source: ModelSource) -> None:
    density = predictor_density(source.spec, 0.5, 8)
    predictor = Predictor(torch.zeros(64, 8), torch.zeros(8, 96), torch.zeros(96))
    assert density + predictor.parameters / (3 * 64 * 96) == pytest.approx(0.5)
    assert math.isclose(predictor.parameters, 8 * (64 + 96) + 96)


def test_predictors_that_read_too_much_are_refused(source: ModelSource) -> None:
    with pytest.raises(UsageError, match=r"Predictors of rank 64 read 0.561 .* at sparsity 0.5. Lower the rank"):
        predictor_density(source.spec, 0.5, 64)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"epochs": 0}, {"batch_tokens": 0}])
def test_settings_out_of_range(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="of 1 or more"):
        PredictorSettings(**wrong)
