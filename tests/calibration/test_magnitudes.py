"""Histograms of inputs, and thresholds from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tda_export.calibration.magnitudes import (
    ALL_BINS,
    BINS,
    MagnitudeCounter,
    bin_edges,
    count_magnitudes,
    float_bins,
    magnitude_edges,
    row_norms,
    teal_row_prices,
    thresholds_at,
    wina_row_prices,
)
from tda_export.models.linear_modules import watch_sites
from tda_export.models.row_dropping import dropping
from tda_export.models.spec import DecoderSpec
from tda_export.packing import PACKINGS, Packing, packed_matrices
from tests.linears_by_hand import by_hand

Family = Callable[[str], tuple[Any, DecoderSpec]]


@given(st.lists(st.floats(0, width=32, allow_nan=False), min_size=1, max_size=20))
def test_every_float_is_in_its_bin(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    bins, edges = float_bins(x), bin_edges()
    assert int(bins.min()) >= 0
    assert int(bins.max()) < ALL_BINS
    finite = x.isfinite()
    assert bool((edges[bins] <= x).all())
    assert bool((x[finite] < edges[bins[finite] + 1]).all())
    assert torch.equal(bins.sort().values, bins[x.argsort()])


@given(st.lists(st.floats(-1e9, 1e9, width=32), min_size=1, max_size=50))
def test_magnitudes_are_counted(values: list[float]) -> None:
    """Small magnitudes and zeros are in the first bin, large ones in the last."""
    counts, edges = count_magnitudes(torch.tensor(values)), magnitude_edges()
    assert counts.shape == (BINS,)
    assert edges.shape == (BINS + 1,)
    expected = [0] * BINS
    for value in values:
        expected[max(0, min(BINS, int((edges <= abs(value)).sum())) - 1)] += 1
    assert counts.tolist() == expected


@pytest.mark.parametrize("density", [0.0, 0.05, 0.35, 0.5, 0.8, 0.999, 1.0])
def test_a_threshold_has_its_density(density: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.stack([torch.randn(40_000, generator=generator), 1e-3 * torch.rand(40_000, generator=generator)])
    histogram = torch.stack([count_magnitudes(row) for row in x])
    thresholds = thresholds_at(histogram, torch.full((2,), density))
    reached = (x.abs() >= thresholds[:, None]).double().mean(dim=1)
    assert reached == pytest.approx(density, abs=1e-3)
    assert density < 1 or not thresholds.any()


def test_thresholds_fall_with_the_density() -> None:
    histogram = count_magnitudes(torch.randn(5000, generator=torch.Generator().manual_seed(1)))[None]
    thresholds = [float(thresholds_at(histogram, torch.tensor([d / 100]))) for d in range(101)]
    assert thresholds == sorted(thresholds, reverse=True)


def test_zeros_need_no_threshold() -> None:
    """With ReLU no density above the share of nonzero inputs can be reached."""
    histogram = count_magnitudes(torch.tensor([0.0, 0.0, 0.0, 1.0]))[None]
    assert float(thresholds_at(histogram, torch.tensor([0.2]))) > 0.9
    assert float(thresholds_at(histogram, torch.tensor([0.5]))) < 1e-6


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gpt-neox"])
def test_inputs_of_all_sites_are_counted(family: Family, name: str) -> None:
    model, spec = family(name)
    norms = row_norms(model, spec)
    weights = {part: by_hand(model, spec, 1, part)[1] for part in ("q", "k", "v", "o", *spec.ffn_parts)}
    for part, weight in weights.items():
        torch.testing.assert_close(norms[part][1], weight.norm(dim=1))
    packed = torch.cat([weights["q"], weights["k"], weights["v"]], dim=1)
    torch.testing.assert_close(norms["qkv"][1], packed.norm(dim=1))
    counter, inputs = MagnitudeCounter(spec, norms), dict[str, torch.Tensor]()

    def observe(layer: int, site: str, x: torch.Tensor) -> None:
        counter.observe(layer, site, x)
        if layer == 1:
            inputs[site] = x

    with torch.no_grad(), watch_sites(model, spec, observe):
        model(torch.tensor([[4, 30, 99]]))
    assert set(counter.counts.inputs) == set(inputs)
    for site, x in inputs.items():
        assert torch.equal(counter.counts.inputs[site][1], count_magnitudes(x))
    assert torch.equal(counter.counts.weighted["k"][1], count_magnitudes(inputs["qkv"] * norms["k"][1]))
    assert torch.equal(counter.counts.weighted["qkv"][1], count_magnitudes(inputs["qkv"] * norms["qkv"][1]))
    total = counter.counts + counter.counts
    assert torch.equal(total.weighted["down"], 2 * counter.counts.weighted["down"])


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("method", ["teal", "wina"])
def test_row_prices_of_other_methods_have_their_densities(family: Family, packing: Packing, method: str) -> None:
    """At the first site of the first layer, whose inputs are unchanged, densities are those that were asked for."""
    model, spec = family("llama")
    tokens = torch.arange(3, 120)[None]
    norms = row_norms(model, spec)
    counter = MagnitudeCounter(spec, norms)
    with torch.no_grad(), watch_sites(model, spec, counter.observe):
        model(tokens)
    asked = {name: torch.linspace(0.3, 0.9, spec.num_layers) for name in packed_matrices(spec, packing)}
    if method == "teal":
        prices = teal_row_prices(counter.counts, spec, packing, asked)
    else:
        prices = wina_row_prices(counter.counts, norms, spec, packing, asked)
    with torch.no_grad(), dropping(model, spec, prices, 1.0) as count:
        model(tokens)
    for part in ("q", "k", "v"):
        assert float(count.densities(spec)[part][0]) == pytest.approx(0.3, abs=0.01)
    scores = prices["o"][0].sqrt()
    assert (len(scores.unique()) == 1) == (method == "teal")
    if method == "wina":
        torch.testing.assert_close(scores / scores[0], norms["o"][0] / norms["o"][0, 0])


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_all_rows_or_none(family: Family, density: float) -> None:
    model, spec = family("llama")
    norms = row_norms(model, spec)
    counter = MagnitudeCounter(spec, norms)
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad(), watch_sites(model, spec, counter.observe):
        model(tokens)
    asked = {name: torch.full((spec.num_layers,), density) for name in packed_matrices(spec, "separate")}
    for prices in (
        teal_row_prices(counter.counts, spec, "separate", asked),
        wina_row_prices(counter.counts, norms, spec, "separate", asked),
    ):
        with torch.no_grad(), dropping(model, spec, prices, 1.0) as count:
            model(tokens)
        assert float(count.densities(spec)["gate"][0]) == pytest.approx(density, abs=1e-3)
