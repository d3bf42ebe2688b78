"""Factors of prices: their gradient against masks by hand, the search for them, and what it is given back as."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tda_export.calibration import price_run, refine
from tda_export.calibration.corpus import Corpus
from tda_export.calibration.divergence import mean_kl
from tda_export.calibration.price_file import priced_tensors
from tda_export.calibration.price_table import Measured, choose_prices, measure_sequence
from tda_export.calibration.prices import no_prices, price_continuation, read_prompt, sampled_labels
from tda_export.calibration.refine import BATCH, LEVELS, WIDTH, Refinement
from tda_export.calibration.resume import PartialFile
from tda_export.calibration.run import Calibration, CalibrationSettings, calibrate
from tda_export.errors import TdaError
from tda_export.models.source import resolve_model
from tda_export.models.spec import DecoderSpec
from tda_export.packing import PACKINGS, Packing, RowBytes, linear_parts, linear_shape, packed_matrices
from tests.calibration.shown import Shown
from tests.few_prices import few_prices  # noqa: F401 -- a fixture
from tests.linears_by_hand import by_hand, patched
from tests.tiny import FAMILIES

Family = Callable[[str], tuple[Any, DecoderSpec]]
PROMPT, LENGTH = 8, 16
ROW_BYTES = RowBytes(4)
CORPUS = Corpus(torch.arange(5, 77).reshape(6, 12), "some.txt", "0" * 64)
SETTINGS = CalibrationSettings(prompt_tokens=8, continuation_tokens=4, sequences=6, refine_steps=3)


def draw_tokens(spec: DecoderSpec, count: int) -> torch.Tensor:
    return torch.randint(3, spec.vocab_size, (count, LENGTH), generator=torch.Generator().manual_seed(4))


def row_prices_of(model: Any, spec: DecoderSpec, packing: Packing, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    sums = no_prices(spec)
    for index, sequence in enumerate(tokens):
        cache = read_prompt(model, sequence[:PROMPT])
        sums = sums + price_continuation(model, spec, cache, sequence[PROMPT:], sampled_labels(1, 0, index))
    return sums.row_prices(spec, packing, ROW_BYTES)


def median_price(row_prices: dict[str, torch.Tensor]) -> float:
    """Return a price near which many rows are."""
    return 0.1 * float(torch.cat([value.flatten() for value in row_prices.values()]).median())


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradient_is_that_of_masks(family: Family, name: str, packing: Packing) -> None:
    """By hand: x times a mask with a gradient for each token and row. A factor's is the sum over tokens of the mask's
    and of what the row's bytes cost, times the logistic function's derivative."""
    model, spec = family(name)
    sequence = draw_tokens(spec, 1)[0]
    row_prices = row_prices_of(model, spec, packing, draw_tokens(spec, 2))
    factors = {
        name: torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 3
        for name, value in row_prices.items()
    }
    price, reference, slope, short = median_price(row_prices), 0.3, 9.0, 2
    level = torch.tensor([math.log(price), reference, slope], dtype=torch.float64)
    passes = refine._Passes(model, spec, row_prices, ROW_BYTES, short)
    found, read = passes.gradients(sequence, factors, level)

    matrix = {part: name for name, parts in packed_matrices(spec, packing).items() for part in parts}
    masks: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}

    def masked(layer: int, part: str, x: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        module, weight, columns = by_hand(model, spec, layer, part)
        own = (row_prices[matrix[part]][layer].double() * factors[matrix[part]][layer].exp()).float()
        worth = x.detach().square() * own
        mask = (~(worth < price)).float().requires_grad_()
        masks[layer, part] = mask, worth
        bias = getattr(module, "bias", None)
        return (x * mask) @ weight + (0 if bias is None else bias[columns])

    cache = read_prompt(model, sequence[:short])
    with torch.no_grad():
        dense = passes._read(cache, sequence)
    with torch.enable_grad(), patched(model, spec, masked):
        loss = mean_kl(dense, passes._read(cache, sequence)) / reference
    gradients = torch.autograd.grad(loss, [mask for mask, _ in masks.values()])

    sizes = {part: linear_shape(spec, part) for part in linear_parts(spec)}
    total = spec.num_layers * sum(inputs * outputs * 4 for inputs, outputs in sizes.values())
    expected = {name: torch.zeros_like(value) for name, value in row_prices.items()}
    bytes_read = 0.0
    for ((layer, part), (mask, worth)), gradient in zip(masks.items(), gradients, strict=True):
        row = 4 * sizes[part][1]
        logistic = torch.sigmoid((worth / price).clamp_min(1e-30).log() / WIDTH)
        cost = slope * row / total / (LENGTH - short)
        change = (gradient + cost) * logistic * (1 - logistic) / WIDTH
        expected[matrix[part]][layer] += change.sum(dim=0).where(row_prices[matrix[part]][layer] > 0, 0)
        bytes_read += float((mask.detach() * (worth > 0)).sum()) * row / (LENGTH - short)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-5 * float(value.abs().max()) + 1e-7)
    assert read == pytest.approx(bytes_read / total, abs=0.01)
    assert 0.1 < read < 0.95


@pytest.mark.parametrize("reference", [1e-5, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(family: Family, dtype: torch.dtype, reference: float) -> None:
    """With a small KL_0 scaled gradients overflow float16, so the scale falls; with a large one they would underflow
    without it. Of the small KL of a random model rounding to bfloat16 loses more than of a gradient by labels."""
    model, spec = family("llama")
    sequence, prices = draw_tokens(spec, 1)[0], row_prices_of(model, spec, "separate", draw_tokens(spec, 2))
    factors = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in prices.items()}
    level = torch.tensor([math.log(30 * median_price(prices)), reference, 0.0], dtype=torch.float64)
    exact, half = (
        refine._Passes(each, spec, prices, ROW_BYTES, 2).gradients(sequence, factors, level)
        for each in (model, copy.deepcopy(model).to(dtype))
    )
    assert half[1] == pytest.approx(exact[1], abs=0.02)
    together = [torch.cat([each[0][name].flatten() for name in prices]) for each in (exact, half)]
    alike = torch.nn.functional.cosine_similarity(*together, dim=0)
    assert float(alike) > (0.95 if dtype == torch.float16 else 0.7)
    assert float(together[1].norm() / together[0].norm()) == pytest.approx(1, abs=0.3)


def loss_at(model: Any, spec: DecoderSpec, tokens: torch.Tensor, prices: dict[str, torch.Tensor]) -> float:
    """Return the logarithm of the KL at half of the bytes, from a table of several prices."""
    chosen = choose_prices(model, spec, tokens, 2, {"separate": prices}, ROW_BYTES)["separate"]
    measured = Measured.begin(spec, chosen)
    for sequence in tokens:
        measure_sequence(model, spec, sequence, 2, {"separate": prices}, {"separate": measured})
    linears = {part: linear_shape(spec, part) for part in linear_parts(spec)}
    table = measured.table(linears, "separate", ROW_BYTES, LENGTH - 2)
    return float(torch.tensor(table.predicted(table.price_for(sparsity=0.5)).kl).log())


def test_a_distortion_of_prices_is_undone(family: Family) -> None:
    """Each row's price times a random factor, of e^2 in the root mean square. Refining lowers the KL at the same bytes
    and moves factors the other way."""
    model, spec = family("llama")
    tokens = draw_tokens(spec, 12)
    exact = row_prices_of(model, spec, "separate", tokens)
    generator = torch.Generator().manual_seed(2)
    noise = {name: 2 * torch.randn(value.shape, generator=generator) for name, value in exact.items()}
    distorted = {name: value * noise[name].exp() for name, value in exact.items()}
    found = refine.refine(model, spec, tokens, PROMPT, "separate", distorted, ROW_BYTES, 40, seed=0)
    before, after = loss_at(model, spec, tokens, distorted), loss_at(model, spec, tokens, found.apply(distorted))
    assert after < before - 0.1
    moved = torch.cat([found.factors[name].flatten() for name in exact]).float()
    given = torch.cat([noise[name].flatten() for name in exact])
    assert float(torch.corrcoef(torch.stack([moved, given]))[0, 1]) < -0.3
    assert not found.under_way
    assert found.step == 40


def test_prices_follow_their_shares(family: Family) -> None:
    model, spec = family("llama")
    tokens = draw_tokens(spec, 8)
    prices = row_prices_of(model, spec, "sites", tokens)
    found = refine.refine(model, spec, tokens, PROMPT, "sites", prices, ROW_BYTES, 30, seed=0)
    passes = refine._Passes(model, spec, found.apply(prices), ROW_BYTES, PROMPT // 4)
    levels = found.levels[:, 0].exp().tolist()
    read = torch.tensor([[share for _, share in passes.measure(each, levels)] for each in tokens]).mean(dim=0)
    assert read.tolist() == pytest.approx(list(LEVELS), abs=0.05)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 30), st.integers(0, 2**32))
def test_every_sequence_comes_before_one_comes_again(sequences: int, levels: int, steps: int, seed: int) -> None:
    batches = refine._schedule(sequences, levels, steps, seed)
    assert [len(batch) for batch in batches] == [BATCH] * steps
    assert batches == refine._schedule(sequences, levels, steps, seed)
    order = [sequence for batch in batches for sequence, _ in batch]
    for start in range(0, len(order), sequences):
        epoch = order[start : start + sequences]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(sequences))
    assert {level for batch in batches for _, level in batch} <= set(range(levels))


def test_where_prices_cannot_be_chosen_factors_stay(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    model, spec = family("llama")
    tokens = draw_tokens(spec, 4)
    prices = row_prices_of(model, spec, "separate", tokens)
    monkeypatch.setattr(refine, "choose_prices", lambda *a, **o: {"separate": [1e-9]})
    came: list[int] = []
    found = refine.refine(model, spec, tokens, PROMPT, "separate", prices, ROW_BYTES, 2, seed=0, advance=came.append)
    assert sum(came) == 2 * BATCH
    for name, value in found.apply(prices).items():
        assert torch.equal(value, prices[name])


def test_gradients_that_are_not_finite(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    model, spec = family("llama")
    tokens = draw_tokens(spec, 4)
    prices = row_prices_of(model, spec, "separate", tokens)
    monkeypatch.setattr(refine, "mean_kl", lambda p, q: (p.exp() * (p - q)).sum(dim=-1).mean() * 1e38 * 1e38)
    passes = refine._Passes(model, spec, prices, ROW_BYTES, 2)
    factors = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in prices.items()}
    level = torch.tensor([math.log(median_price(prices)), 1.0, 1.0], dtype=torch.float64)
    with pytest.raises(TdaError, match=r"^Gradients are not finite\. Calibrate with --dtype bf16 or fp32\.$"):
        passes.gradients(tokens[0], factors, level)


# Within a calibration


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Any:
    return resolve_model(str(tiny_model))


@pytest.fixture(scope="module")
def uninterrupted(tiny: Any) -> Calibration:
    return calibrate(tiny, CORPUS, SETTINGS, {"max_kl": 0.05}, show=Shown())


def test_what_is_recorded(tiny: Any, uninterrupted: Calibration) -> None:
    priced = uninterrupted.priced
    assert priced is not None
    assert uninterrupted.provenance["settings"]["refine_steps"] == 3
    assert list(priced.refined) == list(PACKINGS)
    for packing, refinement in priced.refined.items():
        assert (refinement.step, refinement.under_way) == (3, False)
        estimated = priced.sums.row_prices(tiny.spec, packing, priced.row_bytes)
        for name, value in priced.row_prices(tiny.spec, packing).items():
            factor = refinement.factors[name].exp() if name != "head" else torch.ones(1)
            torch.testing.assert_close(value.double(), estimated[name].double() * factor, rtol=1e-6, atol=0)
        assert any(float(value.abs().max()) > 0.01 for value in refinement.factors.values())


def test_the_table_is_of_the_refined_prices(tiny: Any, uninterrupted: Calibration) -> None:
    priced = uninterrupted.priced
    assert priced is not None
    model = tiny.reference().requires_grad_(False)
    for packing in PACKINGS:
        by_hand = {packing: priced.measured[packing].empty()}
        prices = {packing: priced.row_prices(tiny.spec, packing)}
        for sequence in CORPUS.tokens[1::2]:
            measure_sequence(model, tiny.spec, sequence, 8, prices, by_hand)
        assert torch.equal(by_hand[packing].kl, priced.measured[packing].kl)


def test_progress(tiny: Any) -> None:
    shown = Shown()
    calibrate(tiny, CORPUS, SETTINGS, {"max_kl": 0.05}, show=shown)
    assert [bar[0] for bar in shown.bars] == ["Pricing", "Refining prices", "Measuring prices"]
    assert shown.bars[1][1:] == [2 * 3 * BATCH, 2 * 3 * BATCH]


class Interruption(Exception):
    pass


@pytest.mark.parametrize("saves", [1, 2, 4, 5, 8])
def test_an_interrupted_search_goes_on(
    tiny: Any, uninterrupted: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: int
) -> None:
    """After the prices, each step and each packing the state is saved. The result is the same to the bit."""
    for module in (price_run, refine):
        monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    output, original, left = tmp_path / "c", PartialFile.save_priced, iter(range(100))
    with pytest.MonkeyPatch.context() as patch:

        def save(self: PartialFile, priced: Any) -> None:
            original(self, priced)
            if next(left) == 3 + saves:  # the prices of three sequences and of all come before
                raise Interruption

        patch.setattr(PartialFile, "save_priced", save)
        with pytest.raises(Interruption):
            calibrate(tiny, CORPUS, SETTINGS, {"max_kl": 0.05}, show=Shown(), output=output)
    steps: list[int] = []
    adam = refine._adam
    monkeypatch.setattr(refine, "_adam", lambda found, *rest: (steps.append(found.step), adam(found, *rest))[1])
    shown = Shown()
    calibration = calibrate(tiny, CORPUS, SETTINGS, {"max_kl": 0.05}, show=shown, output=output)
    assert len(steps) < 6
    assert all(units == came for _, units, came in shown.bars)
    ours, theirs = (priced_tensors(each.priced) for each in (calibration, uninterrupted) if each.priced)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_without_steps_prices_are_as_estimated(tiny: Any) -> None:
    settings = dataclasses.replace(SETTINGS, refine_steps=0)
    priced = calibrate(tiny, CORPUS, settings, {"max_kl": 0.05}, show=Shown()).priced
    assert priced is not None
    assert priced.refined == {}


def test_factors_leave_the_head() -> None:
    refinement = Refinement({"o": torch.full((1, 2), 2.0, dtype=torch.float64).log()})
    found = refinement.apply({"o": torch.tensor([[1.0, 3.0]]), "head": torch.tensor([[5.0]])})
    assert found["o"].flatten().tolist() == pytest.approx([2.0, 6.0])
    assert found["head"].tolist() == [[5.0]]
