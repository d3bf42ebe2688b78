"""Fit the methods of `reference_methods.py` and `predictor.py` to a calibration text, in one pass over the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch

from tda_export.calibration.cett import neuron_scores
from tda_export.errors import UsageError
from tda_export.evaluation.predictor import (
    Predictor,
    PredictorMethod,
    PredictorSettings,
    predictor_density,
    train_predictor,
)
from tda_export.evaluation.reference_data import layer_activations
from tda_export.evaluation.reference_methods import (
    CatsMethod,
    ReferenceMethod,
    cats_density,
    cats_threshold,
    static_method,
)
from tda_export.graph.method import kept_neurons
from tda_export.models.spec import DecoderSpec

MethodName = Literal["static", "cats", "dejavu"]


class Wanted(NamedTuple):
    """A method, and the share of FFN bytes that it shall not read, in [0, 1)."""

    method: MethodName
    sparsity: float


def check_wanted(wanted: Wanted, spec: DecoderSpec, settings: PredictorSettings) -> None:
    """Refuse what cannot be fitted, before anything is computed.

    Raises:
        UsageError: The sparsity is no share, or more than the method can save.
    """
    if not 0 <= wanted.sparsity < 1:
        raise UsageError(f"Sparsity {wanted.sparsity} is outside [0, 1). Give a fraction such as 0.5.")
    if wanted.method == "cats":
        cats_density(wanted.sparsity)
    if wanted.method == "dejavu":
        predictor_density(spec, wanted.sparsity, settings.rank)


def fit_methods(
    model: Any,
    spec: DecoderSpec,
    inputs: Sequence[torch.Tensor],
    wanted: Sequence[Wanted],
    settings: PredictorSettings,
    advance: Callable[[int], None] = lambda layers: None,
) -> dict[Wanted, ReferenceMethod]:
    """Fit every wanted method to the FFN inputs of a calibration text.

    Args:
        model: A transformers model in evaluation mode.
        spec: Its architecture.
        inputs: L tensors, float32 [T, M] (`reference_data.ffn_inputs`).
        wanted: Methods and sparsities.
        settings: Of predictors.
        advance: Told of every layer that is done.

    Returns:
        The methods, in the order of `wanted`.

    Raises:
        UsageError: See `check_wanted`.
    """
    for one in wanted:
        check_wanted(one, spec, settings)
    prior: list[torch.Tensor] = []
    thresholds: dict[Wanted, list[float]] = {one: [] for one in wanted if one.method == "cats"}
    predictors: dict[Wanted, list[Predictor]] = {one: [] for one in wanted if one.method == "dejavu"}
    density = {one: predictor_density(spec, one.sparsity, settings.rank) for one in predictors}
    for layer, x in enumerate(inputs):
        activations = layer_activations(model, spec, layer, x)
        prior.append(neuron_scores(activations.relative))
        for one, chosen in thresholds.items():
            chosen.append(cats_threshold(activations.activated, one.sparsity))
        for one, trained in predictors.items():
            trained.append(train_predictor(x, activations.relative, density[one], settings))
        advance(1)
    size = model.get_submodule(spec.names.down.format(i=0)).weight.element_size()

    def fitted(one: Wanted) -> ReferenceMethod:
        if one.method == "static":
            return static_method(torch.stack(prior), one.sparsity)
        if one.method == "cats":
            return CatsMethod(thresholds[one])
        return PredictorMethod(predictors[one], kept_neurons(density[one], spec.ffn_size), size)

    return {one: fitted(one) for one in wanted}
