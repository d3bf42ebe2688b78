"""Points of a measured path: at its settings, between them, and at both ends."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tda_export.calibration.kl_table import FITTED, HELD_OUT, KlSetting, KlTable, setting_at, sparsest_within
from tda_export.errors import UsageError

SHARES = [0.8, 0.5, 0.25]
KL = [0.01, 0.1, 0.4]
BY_LAYER = ("thresholds", "token_thresholds", "mask_density", "token_density", "cett")


def table(shares: list[float] = SHARES, kl: list[float] = KL, **changes: list[list[float]]) -> KlTable:
    """Make a table of two layers with a KL of 0 on the fitted half, so that only the held-out half counts."""
    number = len(shares)
    rising = [(i + 1) / number for i in range(number)]
    columns = {
        "thresholds": [[1e-3 * r, 2e-3 * r] for r in rising],
        "token_thresholds": [[0.1 * r, 0.0] for r in rising],
        "mask_density": [[share, min(1.0, 1.1 * share)] for share in shares],
        "token_density": [[0.9 * share, share] for share in shares],
        "cett": [[0.2 * r, 0.3 * r] for r in rising],
        "sensitivity": [[0.0, 0.0]] * number,
        "kl": [[0.0, value] for value in kl],
        "kl_stderr": [[0.0, 0.0]] * number,
    } | changes
    tensors = {name: torch.tensor(rows, dtype=torch.float32) for name, rows in columns.items()}
    return KlTable(share=torch.tensor(shares), prior_tokens=torch.tensor([8.0]), **tensors)


@st.composite
def tables(draw: st.DrawFn) -> KlTable:
    """Draw paths of one to six settings. The divergence may be zero, noisy, falling or negative."""
    number = draw(st.integers(1, 6))
    shares = sorted(draw(st.lists(st.integers(1, 99), min_size=number, max_size=number, unique=True)), reverse=True)
    kl = draw(st.lists(st.one_of(st.just(0.0), st.floats(-0.0078125, 5, width=32)), min_size=number, max_size=number))
    return table([share / 100 for share in shares], kl)


def lists(setting: KlSetting) -> dict[str, list[float]]:
    return {name: getattr(setting, name) for name in BY_LAYER}


@pytest.mark.parametrize("index", [0, 1, 2])
def test_measured_settings_come_back_exactly(index: int) -> None:
    measured = table()
    share = float(measured.share[index])
    setting = setting_at(measured, share)
    assert setting.share == share
    assert setting.kl == float(measured.kl[index, HELD_OUT])
    assert lists(setting) == {name: getattr(measured, name)[index].tolist() for name in BY_LAYER}


def test_dense_drops_nothing_and_costs_nothing() -> None:
    dense = setting_at(table(), 1.0)
    assert dense.kl == 0
    assert lists(dense) == {name: [1.0, 1.0] if name.endswith("density") else [0.0, 0.0] for name in BY_LAYER}


def test_between_settings_logarithms_of_thresholds_and_divergence_are_linear() -> None:
    setting = setting_at(table(), 0.65)  # half way
    assert setting.kl == pytest.approx(math.sqrt(0.01 * 0.1))
    assert setting.thresholds == pytest.approx([1e-3 * math.sqrt(2) / 3, 2e-3 * math.sqrt(2) / 3])
    assert setting.token_thresholds == pytest.approx([0.1 * math.sqrt(2) / 3, 0.0])
    assert setting.mask_density == pytest.approx([0.65, (0.88 + 0.55) / 2])
    assert setting.cett == pytest.approx([0.1, 0.15])


def test_between_dense_and_the_first_setting_all_is_linear() -> None:
    setting = setting_at(table(), 0.9)
    assert setting.kl == pytest.approx(0.005)
    assert setting.thresholds == pytest.approx([1e-3 / 6, 2e-3 / 6])
    assert setting.token_thresholds == pytest.approx([0.1 / 6, 0.0])
    assert setting.token_density == pytest.approx([(1 + 0.72) / 2, 0.9])


def test_a_threshold_that_begins_at_zero_rises_evenly() -> None:
    measured = table(token_thresholds=[[0.0, 0.2], [0.4, 0.8], [0.5, 0.9]])
    assert setting_at(measured, 0.65).token_thresholds == pytest.approx([0.2, 0.4])


@given(measured=tables(), data=st.data())
def test_everything_is_monotone_in_the_share(measured: KlTable, data: st.DataObject) -> None:
    sparsest = float(measured.share[-1])
    first, second = sorted(data.draw(st.tuples(*[st.floats(sparsest, 1.0)] * 2)))
    sparser, denser = setting_at(measured, first), setting_at(measured, second)
    assert sparser.kl >= denser.kl - 1e-9
    for name in BY_LAYER:
        sign = -1 if name.endswith("density") else 1
        for a, b in zip(getattr(sparser, name), getattr(denser, name), strict=True):
            assert sign * (a - b) >= -1e-7


def relu_table() -> KlTable:
    """Make a table that begins with dense, which reads 80 % of the bytes."""
    changes = {name: getattr(table(), name).tolist() for name in BY_LAYER}
    changes |= {name: [[0.0, 0.0], *changes[name][1:]] for name in ("thresholds", "token_thresholds", "cett")}
    changes["mask_density"][0] = [1.0, 1.0]
    return table(kl=[0.0, 0.1, 0.4], **changes)


@pytest.mark.parametrize("share", [1.0, 0.9, 0.8001])
def test_dense_that_reads_less_than_all_answers_for_every_share_above_it(share: float) -> None:
    measured = relu_table()
    dense = setting_at(measured, share)
    assert (dense.share, dense.kl) == (float(measured.share[0]), 0.0)
    assert lists(dense) == {name: getattr(measured, name)[0].tolist() for name in BY_LAYER}


def test_beyond_a_dense_that_reads_less_the_path_goes_on_from_there() -> None:
    measured = relu_table()
    setting = setting_at(measured, 0.65)  # half way
    assert setting.kl == pytest.approx(0.05)
    assert setting.thresholds == pytest.approx([1e-3 / 3, 2e-3 / 3])
    assert setting.mask_density == pytest.approx([(1 + 0.5) / 2, (1 + 0.55) / 2])
    assert sparsest_within(measured, 0.05).share == pytest.approx(0.65)
    assert sparsest_within(measured, 1e-9).share == pytest.approx(SHARES[0])
    assert measured.from_dense() is measured


def test_measurements_are_plain_numbers_of_each_setting() -> None:
    measured = table(kl=[0.1, 0.3, 1.0], sensitivity=[[0.01, 0.02], [0.1, 0.2], [0.5, 0.25]])
    rows = measured.measurements()
    assert [row["ffn_share"] for row in rows] == pytest.approx(SHARES)
    assert [row["single_layers_kl"] for row in rows] == pytest.approx([0.03, 0.3, 0.75])
    for half, name in ((FITTED, "fitted"), (HELD_OUT, "held_out")):
        assert [row[f"{name}_kl"] for row in rows] == measured.kl[:, half].tolist()
        assert [row[f"{name}_kl_stderr"] for row in rows] == measured.kl_stderr[:, half].tolist()


def test_more_sparsity_than_was_measured_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        setting_at(table(), 0.2)
    assert str(caught.value) == ("Sparsity 0.8 is more than the calibration measured (0.750). Give a lower --sparsity.")


@given(share=st.floats(0.015625, 0.984375, width=32))
def test_the_sparsity_that_the_refusal_names_is_accepted(share: float) -> None:
    measured = table([share], [0.1])
    with pytest.raises(UsageError) as caught:
        setting_at(measured, share / 2)
    named = float(str(caught.value).split("(")[1].split(")")[0])
    assert setting_at(measured, 1 - named).share >= share


def test_the_predicted_divergence_is_that_of_held_out_sequences_and_never_falls() -> None:
    measured = table(kl=[0.1, 0.05, 0.3])
    assert measured.predicted_kl == pytest.approx([0.1, 0.1, 0.3])
    assert float(measured.kl[:, FITTED].max()) == 0


def test_noise_below_zero_predicts_no_divergence() -> None:
    assert table(kl=[-1e-4, -2e-4, 0.3]).predicted_kl == pytest.approx([0.0, 0.0, 0.3])


@pytest.mark.parametrize("kl", KL)
def test_a_measured_divergence_gives_its_setting(kl: float) -> None:
    measured = table()
    index = KL.index(kl)
    found = sparsest_within(measured, float(measured.kl[index, HELD_OUT]))
    assert found.share == pytest.approx(SHARES[index])
    assert found.thresholds == pytest.approx(measured.thresholds[index].tolist(), rel=1e-5)


def test_divergence_limits_between_settings_and_beyond_the_ends() -> None:
    assert sparsest_within(table(), 0.005).share == pytest.approx(0.9)
    assert sparsest_within(table(), math.sqrt(0.01 * 0.1)).share == pytest.approx(0.65)
    for generous in (0.5, math.inf):
        assert sparsest_within(table(), generous) == setting_at(table(), float(table().share[-1]))
    assert sparsest_within(table(), 1e-9).share == pytest.approx(1.0)


def test_a_flat_path_gives_its_sparsest_point() -> None:
    assert sparsest_within(table(kl=[0.1, 0.1, 0.3]), float(torch.tensor(0.1))).share == pytest.approx(0.5)


def test_a_path_that_costs_nothing_at_first() -> None:
    assert sparsest_within(table(kl=[0.0, 0.1, 0.4]), 0.05).share == pytest.approx(0.65)


@given(measured=tables(), max_kl=st.floats(1e-6, 10))
def test_the_result_is_within_the_limit_and_no_denser_than_it_must_be(measured: KlTable, max_kl: float) -> None:
    found = sparsest_within(measured, max_kl)
    assert found.kl <= max_kl
    exact = setting_at(measured, found.share)
    assert exact.kl <= max_kl * (1 + 1e-9) + 1e-12
    assert lists(exact) == lists(found)
    sparsest = float(measured.share[-1])
    assert sparsest <= found.share <= 1
    sparser = found.share - 1e-3
    if sparser >= sparsest:
        assert setting_at(measured, sparser).kl >= max_kl * (1 - 1e-9) - 1e-12


@given(measured=tables())
def test_limits_a_rounding_error_from_a_measured_divergence(measured: KlTable) -> None:
    for kl in measured.predicted_kl:
        for limit in (math.nextafter(kl, 0), kl, math.nextafter(kl, math.inf)):
            if limit > 0:
                assert sparsest_within(measured, limit).kl <= limit


@pytest.mark.parametrize("max_kl", [0.0, -0.1, math.nan])
def test_a_limit_that_is_not_positive_is_refused(max_kl: float) -> None:
    with pytest.raises(UsageError) as caught:
        sparsest_within(table(), max_kl)
    assert str(caught.value) == f"--max-kl {max_kl}: give a positive number of nats a token, such as 0.1."


def test_settings_are_plain_numbers() -> None:
    for value in dataclasses.asdict(setting_at(table(), 0.6)).values():
        assert isinstance(value, float) or all(type(one) is float for one in value)
