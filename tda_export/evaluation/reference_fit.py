"""Fit the methods in PyTorch to a calibration text, in one pass over the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch

from tda_export.calibration.cett import neuron_scores
from tda_export.errors import UsageError
from tda_export.evaluation.moefication import ExpertMethod, expert_scores, kept_experts, layer_experts
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

# moe-true: experts chosen by their true activation, an upper bound; moe: experts chosen by a router.
MethodName = Literal["static", "cats", "dejavu", "moe-true", "moe"]


class Wanted(NamedTuple):
    """A method, and the fraction of FFN bytes to skip, in [0, 1)."""

    method: MethodName
    sparsity: float


def check_wanted(wanted: Wanted, spec: DecoderSpec, settings: PredictorSettings) -> None:
    """Refuse requests that cannot be fitted, before anything is computed.

    Raises:
        UsageError: The sparsity is not a share, or is more than the method can save.
    """
    if not 0 <= wanted.sparsity < 1:
        raise UsageError(f"Sparsity {wanted.sparsity} is outside [0, 1). Give a fraction such as 0.5.")
    if wanted.method == "cats":
        cats_density(wanted.sparsity)
    if wanted.method == "dejavu":
        predictor_density(spec, wanted.sparsity, settings.rank)
    if wanted.method in ("moe-true", "moe"):
        kept_experts(spec, wanted.sparsity, _router_rank(wanted, settings))


def _router_rank(wanted: Wanted, settings: PredictorSettings) -> int | None:
    return settings.rank if wanted.method == "moe" else None


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
        settings: The settings of predictors.
        advance: Called after every layer.

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
    kept = {
        one: kept_experts(spec, one.sparsity, _router_rank(one, settings))
        for one in wanted
        if one.method in ("moe-true", "moe")
    }
    routers: dict[Wanted, list[Predictor]] = {one: [] for one in kept if one.method == "moe"}
    experts: list[torch.Tensor] = []
    norms: list[torch.Tensor] = []
    for layer, x in enumerate(inputs):
        activations = layer_activations(model, spec, layer, x)
        prior.append(neuron_scores(activations.relative))
        for one, chosen in thresholds.items():
            chosen.append(cats_threshold(activations.activated, one.sparsity))
        for one, trained in predictors.items():
            trained.append(train_predictor(x, activations.relative, density[one], settings))
        if kept:
            experts.append(layer_experts(model, spec, layer, settings.seed))
            down = model.get_submodule(spec.names.down.format(i=layer)).weight
            norms.append(down.detach().float().cpu().norm(dim=0))
        for one, trained in routers.items():
            scores = expert_scores(experts[layer], activations.relative)
            share = kept[one] / scores.shape[1]
            trained.append(train_predictor(x, scores, share, settings))
        advance(1)
    size = model.get_submodule(spec.names.down.format(i=0)).weight.element_size()

    def fitted(one: Wanted) -> ReferenceMethod:
        if one.method == "static":
            return static_method(torch.stack(prior), one.sparsity)
        if one.method == "cats":
            return CatsMethod(thresholds[one])
        if one in kept:
            return ExpertMethod(experts, norms, kept[one], routers.get(one), size)
        return PredictorMethod(predictors[one], kept_neurons(density[one], spec.ffn_size), size)

    return {one: fitted(one) for one in wanted}
