"""Estimated losses of linears against gradients of whole models, and against the KL of rounding one linear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tda_export.calibration.prices import sampled_labels
from tda_export.errors import TdaError
from tda_export.models.layerwise import LayerwiseModel
from tda_export.models.linear_modules import layer_linears, watch_sites
from tda_export.models.source import ModelSource, resolve_model
from tda_export.packing import linear_sites
from tda_export.quantization import losses
from tda_export.quantization.gptq import passed_on, row_order
from tda_export.quantization.losses import linear_losses
from tda_export.quantization.nearest import read_matrix, round_matrix
from tda_export.quantization.settings import LABELS, QuantizeSettings
from tda_export.weights.plan import part_name
from tests.tiny import save_tiny_model

TOKENS = torch.randint(3, 259, (5, 24), generator=torch.Generator().manual_seed(0))


def estimated(source: ModelSource, tokens: torch.Tensor = TOKENS, **options: Any) -> dict[str, float]:
    settings = QuantizeSettings(bits_per_weight=6.0, seed=3, **options)
    plan = settings.plan(source.spec)
    names = [name for name in plan.integers if name.startswith("layers.")]
    model = LayerwiseModel(source, "cpu")
    return linear_losses(source, model, plan, names, tokens, settings, advance=lambda layers: None)


def rounding_errors(source: ModelSource) -> dict[str, torch.Tensor]:
    spec, plan = source.spec, QuantizeSettings().plan(source.spec)
    errors = {}
    for name in plan.integers:
        if name.startswith("layers."):
            rows = read_matrix(spec, source.weights(), name)
            codes = round_matrix(name, rows, plan.integers[name], symmetric=False)
            errors[name] = torch.from_numpy(codes.decode()) - rows
    return errors


def gptq_errors(source: ModelSource, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    hessians: dict[tuple[int, str], torch.Tensor] = {}

    def observe(layer: int, site: str, x: torch.Tensor) -> None:
        x = torch.cat([(10 if site == "qkv" else 1) * x[:1], x[1:]])
        hessians[layer, site] = hessians.get((layer, site), torch.zeros(())) + x.T @ x

    model = source.reference()
    with torch.no_grad(), watch_sites(model, source.spec, observe):
        for sequence in tokens:
            model(sequence[None])
    errors = rounding_errors(source)
    for (layer, site), hessian in hessians.items():
        for part in linear_sites(source.spec)[site]:
            name = part_name(layer, part)
            errors[name] = passed_on(errors[name], row_order(hessian))
    return errors


def by_weight_gradients(
    source: ModelSource, errors: dict[str, torch.Tensor], tokens: torch.Tensor, pieces: list[int]
) -> dict[str, float]:
    """Return ½ |E^T ∇|² / out a token, where ∇ is the gradient of the log-likelihood by the weights."""
    model, spec = source.reference().requires_grad_(True), source.spec
    found = dict.fromkeys(errors, 0.0)
    for number, sequence in enumerate(tokens):
        logits = model(sequence[None]).logits[0].float()
        parts = logits.detach().split(pieces)
        labels = torch.cat(
            [sampled_labels(LABELS, 3, number * len(parts) + i)(each) for i, each in enumerate(parts)], dim=1
        )
        for each in labels:
            model.zero_grad()
            logits.log_softmax(dim=-1).gather(1, each[:, None]).sum().backward(retain_graph=True)
            for layer in range(spec.num_layers):
                for part, linear in layer_linears(model, spec, layer).items():
                    gradient = linear.module.weight.grad
                    gradient = linear.of_outputs(gradient if spec.transposed_linears else gradient.T)
                    square = float((errors[part_name(layer, part)].T @ gradient).double().square().sum())
                    found[part_name(layer, part)] += square / linear.outputs / 2 / LABELS / tokens.numel()
    return found


# A family for each way to store linears, and those that scale logits or hidden states.
@pytest.mark.parametrize("name", ["gemma2", "gpt-neox", "gpt2", "granite", "llama", "opt", "phi3", "qwen3"])
def test_against_gradients_by_the_weights(name: str, tmp_path: Path) -> None:
    """GPTQ's Hessians come from the two sequences without gradients."""
    source = resolve_model(str(save_tiny_model(name, tmp_path / name)))
    expected = by_weight_gradients(source, gptq_errors(source, TOKENS[3:]), TOKENS[:3], [24])
    assert estimated(source) == pytest.approx(expected, rel=2e-3, abs=1e-12)


def test_rounding_to_nearest_and_logits_in_pieces(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "TOKENS_AT_ONCE", 10)
    source = resolve_model(str(tiny_model))
    expected = by_weight_gradients(source, rounding_errors(source), TOKENS, [10, 10, 4])
    assert estimated(source, quantizer="rtn") == pytest.approx(expected, rel=2e-3)


def test_a_single_sequence_has_no_hessian(tiny_model: Path) -> None:
    """There are no other inputs for a Hessian, so the estimate for GPTQ is that of rounding."""
    source = resolve_model(str(tiny_model))
    one = estimated(source, TOKENS[:1])
    assert one == pytest.approx(estimated(source, TOKENS[:1], quantizer="rtn"), rel=1e-3)


def test_what_rounding_a_linear_costs(tiny_model: Path) -> None:
    """Over all linears, because single ones are noisy. The tiny model's layers change its predictions little."""
    source = resolve_model(str(tiny_model))
    tokens = torch.randint(3, 259, (32, 24), generator=torch.Generator().manual_seed(5))
    found = estimated(source, tokens, quantizer="rtn")
    model, errors = source.reference(), rounding_errors(source)
    measured = {}
    with torch.no_grad():
        exact = model(tokens).logits.log_softmax(dim=-1).double()
        for layer in range(source.spec.num_layers):
            for part, linear in layer_linears(model, source.spec, layer).items():
                name, own = part_name(layer, part), linear.weight.clone()
                linear.set_weight(own + errors[name])
                changed = model(tokens).logits.log_softmax(dim=-1).double()
                linear.set_weight(own)
                measured[name] = float((exact.exp() * (exact - changed)).sum(dim=-1).mean())
    assert sum(found.values()) == pytest.approx(sum(measured.values()), rel=0.25)
    for part in ("v", "gate", "down"):
        one, other = (
            sum(value for name, value in each.items() if name.endswith(f".{part}")) for each in (found, measured)
        )
        assert one == pytest.approx(other, rel=0.4), part


def test_logits_that_are_not_finite(tiny_model: Path) -> None:
    source = resolve_model(str(tiny_model))
    model, settings = LayerwiseModel(source, "cpu"), QuantizeSettings(quantizer="rtn", bits_per_weight=6.0)
    model.model.get_parameter("model.norm.weight").data = torch.full((64,), float("nan"))
    plan, ignore = settings.plan(source.spec), lambda layers: None
    with pytest.raises(TdaError, match=r": the logits are not finite\. Download the weights again\.$"):
        linear_losses(source, model, plan, ["layers.0.q"], TOKENS, settings, advance=ignore)


def test_an_estimate_that_is_not_finite(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = losses.passed_on
    monkeypatch.setattr(losses, "passed_on", lambda *arguments: original(*arguments) / 0)
    with pytest.raises(TdaError, match=r"^layers\.0\.q: the estimate of its loss is not finite\. Check the checkpoint"):
        estimated(resolve_model(str(tiny_model)))
