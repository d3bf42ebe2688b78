"""The second part of a calibration on a tiny model, against slow measurements of its settings."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

from tda_export.calibration.dense import blend, read_dense
from tda_export.calibration.kl_path import STEPS, WARM_UP
from tda_export.calibration.kl_plan import KlPlan, plan_for
from tda_export.calibration.kl_run import Sweep, find_path, neuron_scales
from tda_export.calibration.kl_table import FITTED, HELD_OUT, SHARES, KlTable
from tda_export.calibration.run import CalibrationSettings, accumulate_curves
from tda_export.errors import UsageError
from tda_export.graph.reference import SecondLevel, masked_ffn
from tda_export.models.ffn_modules import FfnModules
from tests.calibration.kl_case import CONTINUATION, PRIOR_TOKENS, PROMPT, KlCase, make_case, seen_by_ffns

ODD = 5  # sequences: three fit the path, two are held out


def run(case: KlCase, sequences: int, **options: object) -> tuple[KlTable, list[int]]:
    told: list[int] = []
    arguments = {"prior_tokens": PRIOR_TOKENS, "seed": 0, "advance": told.append} | options
    return find_path(case.model, case.spec, case.tokens[:sequences], PROMPT, case.scale, **arguments), told  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> KlCase:
    return make_case(tmp_path_factory.mktemp("run"), sequences=9)


@pytest.fixture(scope="module")
def found(case: KlCase) -> KlTable:
    return run(case, ODD)[0]


@pytest.mark.parametrize("sequences", [2, 3, 9])
def test_units_told_are_those_of_the_plan(case: KlCase, sequences: int) -> None:
    table, told = run(case, sequences)
    assert sum(told) == KlPlan(sequences).units(case.spec.num_layers)
    assert all(getattr(table, field.name).isfinite().all() for field in dataclasses.fields(KlTable))


@pytest.mark.parametrize(("sequences", "fitted", "batch"), [(2, 1, 2), (3, 2, 2), (64, 32, 8), (65, 33, 8)])
def test_plans_split_sequences_in_half(sequences: int, fitted: int, batch: int) -> None:
    assert (KlPlan(sequences).fitted, KlPlan(sequences).batch) == (fitted, batch)


def test_shapes_and_ranges(case: KlCase, found: KlTable) -> None:
    settings, layers = len(SHARES), case.spec.num_layers
    shapes = {"share": (settings,), "kl": (settings, 2), "kl_stderr": (settings, 2), "prior_tokens": (1,)}
    for field in dataclasses.fields(KlTable):
        tensor = getattr(found, field.name)
        assert tensor.dtype == torch.float32
        assert tensor.shape == shapes.get(field.name, (settings, layers))
        assert (tensor >= 0).all()
    assert float(found.prior_tokens) == PRIOR_TOKENS
    assert (found.token_density <= found.mask_density + 1e-6).all()


def test_measured_shares_are_near_those_aimed_at(found: KlTable) -> None:
    assert found.share.tolist() == pytest.approx(SHARES, abs=0.04)
    torch.testing.assert_close(found.share, ((found.mask_density + 2 * found.token_density) / 3).mean(dim=1))


def test_divergence_rises_along_the_path(found: KlTable) -> None:
    for half in (FITTED, HELD_OUT):
        assert (found.kl[1:, half] > found.kl[:-1, half] - 0.02).all()
        assert found.kl[-1, half] > 2 * found.kl[0, half]


def test_settings_cost_what_the_reference_says(case: KlCase, found: KlTable) -> None:
    """Measure each setting again with the reference of masked FFNs, given only the table."""
    sequences = read_dense(case.model, case.spec, case.tokens[:ODD], PROMPT)
    blended, layers = blend(sequences, PRIOR_TOKENS), case.spec.num_layers
    for index in (0, 3, len(SHARES) - 1):
        halves: list[list[float]] = [[], []]
        densities, cett = torch.zeros(2, layers, dtype=torch.float64), torch.zeros(layers, dtype=torch.float64)
        for number, (sequence, statistics) in enumerate(zip(sequences, blended, strict=True)):
            keep = statistics.score_square.sqrt() >= found.thresholds[index][:, None]
            tails = [
                down @ (means * ~kept)
                for down, means, kept in zip(case.down, statistics.mean_activation, keep, strict=True)
            ]
            second = SecondLevel(list(case.scale), found.token_thresholds[index].tolist())
            with torch.no_grad():
                dense = case.model(case.tokens[number][None]).logits[0, PROMPT:].double().log_softmax(dim=-1)
                with (
                    masked_ffn(case.model, case.spec, list(keep.float()), tails, second),
                    seen_by_ffns(case.model) as seen,
                ):
                    output = case.model(sequence.continuation, past_key_values=sequence.cache(), use_cache=True)
                sparse = output.logits[0].double().log_softmax(dim=-1)
                for layer, block in enumerate(case.model.model.layers):
                    x, masked = seen[layer]
                    gate = torch.nn.functional.silu(block.mlp.gate_proj(x))
                    survivors = keep[layer] & second.keep(layer, gate)
                    densities[:, layer] += torch.tensor([keep[layer].double().mean(), survivors.double().mean()])
                    whole = block.mlp(x)
                    cett[layer] += ((whole - masked).norm(dim=1) / whole.norm(dim=1)).double().mean()
            halves[number % 2].append(float((dense.exp() * (dense - sparse)).sum(dim=-1).mean()))
        for half, kls in enumerate(halves):
            values = torch.tensor(kls)
            assert float(found.kl[index, half]) == pytest.approx(float(values.mean()), rel=0.01)
            assert float(found.kl_stderr[index, half]) == pytest.approx(float(values.std() / len(kls) ** 0.5), rel=0.02)
        torch.testing.assert_close(found.mask_density[index].double(), densities[0] / ODD, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.token_density[index].double(), densities[1] / ODD, rtol=0, atol=2e-3)
        torch.testing.assert_close(found.cett[index].double(), cett / ODD, rtol=1e-3, atol=1e-4)


def test_sensitivities_are_those_of_one_layer_alone(case: KlCase, found: KlTable) -> None:
    sequences = read_dense(case.model, case.spec, case.tokens[:ODD], PROMPT)
    blended, index, held_out = blend(sequences, PRIOR_TOKENS), len(SHARES) - 1, (1, 3)
    for layer in range(case.spec.num_layers):
        kls = []
        for number in held_out:
            keep = torch.ones(case.spec.num_layers, case.spec.ffn_size)
            keep[layer] = (blended[number].score_square[layer].sqrt() >= found.thresholds[index, layer]).float()
            tails = [torch.zeros(case.spec.hidden_size) for _ in keep]
            tails[layer] = case.down[layer] @ (blended[number].mean_activation[layer] * (1 - keep[layer]))
            tokens = [float(found.token_thresholds[index, i]) if i == layer else 0.0 for i in range(len(keep))]
            with torch.no_grad():
                dense = case.model(case.tokens[number][None]).logits[0, PROMPT:].double().log_softmax(dim=-1)
                with masked_ffn(case.model, case.spec, list(keep), tails, SecondLevel(list(case.scale), tokens)):
                    output = case.model(
                        sequences[number].continuation, past_key_values=sequences[number].cache(), use_cache=True
                    )
            sparse = output.logits[0].double().log_softmax(dim=-1)
            kls.append(float((dense.exp() * (dense - sparse)).sum(dim=-1).mean()))
        assert float(found.sensitivity[index, layer]) == pytest.approx(sum(kls) / len(kls), rel=0.02)


def test_held_out_sequences_choose_no_thresholds(case: KlCase, found: KlTable) -> None:
    """Other held-out sequences change their own KL. Thresholds depend on them only through a prior, which is off."""
    tokens = case.tokens[:ODD].clone()
    first = run(dataclasses.replace(case, tokens=tokens), ODD, prior_tokens=0.0)[0]
    tokens[1::2] = tokens[1::2].flip(1)
    second = run(dataclasses.replace(case, tokens=tokens), ODD, prior_tokens=0.0)[0]
    for name in ("thresholds", "token_thresholds"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert torch.equal(first.kl[:, FITTED], second.kl[:, FITTED])
    assert not torch.equal(first.kl[:, HELD_OUT], second.kl[:, HELD_OUT])


@pytest.mark.parametrize("stop", [1, 11, WARM_UP + STEPS, WARM_UP + STEPS + 3, WARM_UP + STEPS + len(SHARES)])
def test_an_interrupted_run_ends_with_the_same_table(case: KlCase, found: KlTable, stop: int) -> None:
    saved: list[Sweep] = []
    run(case, ODD, save=lambda sweep: saved.append(copy.deepcopy(sweep)))
    steps, measured = list(range(1, WARM_UP + STEPS + 1)), list(range(1, len(SHARES) + 1))
    assert [sweep.state.step for sweep in saved] == steps + [WARM_UP + STEPS] * len(SHARES)
    assert [len(sweep.rows) for sweep in saved] == [0] * len(steps) + measured
    table, told = run(case, ODD, resume=saved[stop - 1])
    for field in dataclasses.fields(KlTable):
        assert torch.equal(getattr(table, field.name), getattr(found, field.name)), field.name
    assert sum(told) == KlPlan(ODD).units(case.spec.num_layers)


@pytest.mark.parametrize("sequences", [0, 1])
def test_fewer_than_two_sequences_are_refused(case: KlCase, sequences: int) -> None:
    message = rf"{sequences} is too few for that\. Give --sequences 2 or more and text for them, or --curves-only\.$"
    with pytest.raises(UsageError, match=message):
        run(case, sequences)


def test_relu_begins_with_what_dense_reads(tmp_path: Path) -> None:
    case = make_case(tmp_path, "opt", sequences=ODD)
    saved: list[Sweep] = []
    table, told = run(case, ODD, save=lambda sweep: saved.append(copy.deepcopy(sweep)))
    plan = plan_for(case.spec, ODD)
    assert plan == KlPlan(ODD, dense=True)
    assert sum(told) == plan.units(case.spec.num_layers)
    for rows in (1, 4):  # interrupted after dense, and later
        again, told = run(case, ODD, resume=saved[WARM_UP + STEPS + rows - 1])
        assert sum(told) == plan.units(case.spec.num_layers)
        for field in dataclasses.fields(KlTable):
            assert torch.equal(getattr(again, field.name), getattr(table, field.name)), field.name
    counts: list[torch.Tensor] = []

    def count(h: torch.Tensor) -> None:
        counts.append((h[PROMPT:] != 0).float().mean())

    handles = [FfnModules(case.model, case.spec, layer).on_activations(count) for layer in range(case.spec.num_layers)]
    with torch.no_grad():
        for tokens in case.tokens:
            case.model(tokens[None])
    for handle in handles:
        handle.remove()
    active = torch.stack(counts).reshape(ODD, -1).mean(dim=0)
    assert 0.2 < float(active.min()) < float(active.max()) < 0.8
    torch.testing.assert_close(table.token_density[0], active, rtol=0, atol=1e-3)
    torch.testing.assert_close(table.share[0], (1 + active.mean()) / 2, rtol=0, atol=1e-3)
    assert table.mask_density[0].tolist() == [1.0] * case.spec.num_layers
    for name in ("kl", "kl_stderr", "thresholds", "token_thresholds", "cett", "sensitivity"):
        assert not getattr(table, name)[0].any()
    assert (table.share[1:] < table.share[0]).all()
    assert table.kl[-1, HELD_OUT] > 0


def test_a_model_in_bfloat16(case: KlCase, tmp_path: Path) -> None:
    table, _ = run(make_case(tmp_path, dtype=torch.bfloat16), 4)
    assert table.share.tolist() == pytest.approx(SHARES, abs=0.05)


def test_neuron_scales_are_magnitudes_of_up_and_down(kl_case: KlCase) -> None:
    settings = CalibrationSettings(prompt_tokens=PROMPT, continuation_tokens=CONTINUATION)
    _, sums = accumulate_curves(kl_case.model, kl_case.spec, kl_case.tokens, settings)
    ups = []
    for tokens in kl_case.tokens:
        with torch.no_grad(), seen_by_ffns(kl_case.model) as seen:
            kl_case.model(tokens[None])
            ups.append([block.mlp.up_proj(seen[i][0])[1:] for i, block in enumerate(kl_case.model.model.layers)])
    for layer in range(kl_case.spec.num_layers):
        rms = torch.cat([up[layer] for up in ups]).square().mean(dim=0).sqrt()
        expected = rms * kl_case.down[layer].norm(dim=0)
        torch.testing.assert_close(neuron_scales(kl_case.model, kl_case.spec, sums)[layer], expected, rtol=1e-4, atol=0)
