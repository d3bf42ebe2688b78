"""The whole calibration of priced rows: halves of the sequences, interruptions, and the record."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tda_export.calibration import price_run
from tda_export.calibration.corpus import Corpus
from tda_export.calibration.file import Calibration, read_calibration, write_calibration
from tda_export.calibration.price_file import Priced, priced_tensors
from tda_export.calibration.price_table import measure_sequence, short_prompt, shortened
from tda_export.calibration.resume import PartialFile
from tda_export.calibration.run import CalibrationSettings, calibrate
from tda_export.errors import UsageError
from tda_export.models.source import ModelSource, resolve_model
from tda_export.packing import PACKINGS
from tests.calibration.shown import Shown
from tests.few_prices import SHARES, few_prices  # noqa: F401 -- a fixture

CORPUS = Corpus(torch.arange(5, 77).reshape(6, 12), "some.txt", "0" * 64)
SETTINGS = CalibrationSettings(prompt_tokens=8, continuation_tokens=4, sequences=6)
PASSES = 1 + 2 * len(SHARES)  # of a sequence; each pass also reads it after a short prompt
BUDGET = {"max_kl": 0.05}


class Interruption(Exception):
    pass


def interrupt(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int, *, after: bool) -> None:
    """Raise in the given call of a function, at its beginning or its end."""
    original, calls = getattr(owner, name), iter(range(10**6))

    def broken(*arguments: Any, **options: Any) -> Any:
        last = next(calls) == call
        if last and not after:
            raise Interruption
        result = original(*arguments, **options)
        if last:
            raise Interruption
        return result

    patch.setattr(owner, name, broken)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> ModelSource:
    return resolve_model(str(tiny_model))


@pytest.fixture(scope="module")
def uninterrupted(tiny: ModelSource) -> Calibration:
    return calibrate(tiny, CORPUS, SETTINGS, BUDGET, show=Shown())


def tensors(calibration: Calibration) -> dict[str, torch.Tensor]:
    assert calibration.priced is not None
    return priced_tensors(calibration.priced)


def assert_equal(one: Calibration, other: Calibration) -> None:
    assert tensors(one).keys() == tensors(other).keys()
    for name, tensor in tensors(one).items():
        assert torch.equal(tensor, tensors(other)[name]), name


def test_what_is_recorded(tiny: ModelSource, uninterrupted: Calibration) -> None:
    priced = uninterrupted.priced
    assert priced is not None
    assert (uninterrupted.curves, uninterrupted.kl) == (None, None)
    with pytest.raises(UsageError, match=r"contains prices only, .* Calibrate with --method tda, or all\.$"):
        _ = uninterrupted.sums
    assert uninterrupted.provenance["settings"] == {
        "sequences": 6,
        "prompt_tokens": 8,
        "continuation_tokens": 4,
        "seed": 0,
        "dtype": "fp32",
        "head": "priced",
        "device": "cpu",
        "method": "priced",
        "labels": 2,
        "packings": ["separate", "sites"],
        "refine_steps": 0,
    }
    assert uninterrupted.provenance["budget"] == BUDGET
    assert (float(priced.sums.sequences), float(priced.sums.tokens)) == (3, 3 * 4 * 2)
    assert int(priced.magnitudes.inputs["qkv"].sum()) == 3 * 4 * tiny.spec.hidden_size * tiny.spec.num_layers
    assert int(priced.magnitudes.weighted["down"].sum()) == 3 * 4 * tiny.spec.ffn_size * tiny.spec.num_layers
    assert list(priced.measured) == list(PACKINGS)
    for packing, table in priced.tables().items():
        assert (table.packing, table.element_bytes, table.continuation_tokens) == (packing, 4, 4)
        assert len(table.rows) == 1 + len(SHARES)
        assert priced.measured[packing].kl.shape == (3, 1 + len(SHARES))
        assert table.short is not None
        assert (table.short.prompt_tokens, table.short.table_prompt_tokens) == (1, 8)


def test_progress(tiny: ModelSource) -> None:
    shown = Shown()
    calibrate(tiny, CORPUS, SETTINGS, BUDGET, show=shown)
    assert shown.bars == [["Pricing", 3, 3], ["Measuring prices", 3 + 6 * PASSES, 3 + 6 * PASSES]]


def test_prices_never_see_what_they_are_measured_on(tiny: ModelSource, uninterrupted: Calibration) -> None:
    tokens = CORPUS.tokens.clone()
    tokens[1::2] += 20
    other = calibrate(tiny, dataclasses.replace(CORPUS, tokens=tokens), SETTINGS, BUDGET, show=Shown())
    for name, tensor in tensors(uninterrupted).items():
        of_measuring = (name.startswith("measured.") and name.endswith(("kl", "agreement"))) or ".read." in name
        if not of_measuring:
            assert torch.equal(tensor, tensors(other)[name]), name
    assert not torch.equal(tensors(other)["measured.sites.kl"], tensors(uninterrupted)["measured.sites.kl"])


@pytest.mark.parametrize(
    ("owner", "name", "call", "after", "pricings", "measurings"),
    [
        (price_run, "price_continuation", 2, False, 1, 6),
        (price_run, "choose_prices", 0, False, 0, 6),
        (price_run, "measure_sequence", 0, False, 0, 6),
        (price_run, "measure_sequence", 3, True, 0, 4),  # before it is saved
        (PartialFile, "save_priced", 3 + 1 + 1 + 1, True, 0, 2),
        (PartialFile, "save_priced", 3 + 1 + 1 + 2, True, 0, 0),
    ],
    ids=["pricing", "before the prices", "before the first", "within the second", "after the second", "after all"],
)
def test_an_interrupted_run_goes_on(
    tiny: ModelSource,
    uninterrupted: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    call: int,
    after: bool,
    pricings: int,
    measurings: int,
) -> None:
    """Saved work is not repeated, and the result is the same to the bit."""
    monkeypatch.setattr(price_run, "SAVE_SECONDS", 0.0)
    output = tmp_path / "calibration"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, owner, name, call, after=after)
        with pytest.raises(Interruption):
            calibrate(tiny, CORPUS, SETTINGS, BUDGET, show=Shown(), output=output)
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.partial"]
    done = {"price_continuation": 0, "measure_sequence": 0}

    def counted(step: str) -> Any:
        original = getattr(price_run, step)

        def call(*arguments: Any, **options: Any) -> Any:
            done[step] += 1
            return original(*arguments, **options)

        return call

    for step in done:
        monkeypatch.setattr(price_run, step, counted(step))
    shown = Shown()
    calibration = calibrate(tiny, CORPUS, SETTINGS, BUDGET, show=shown, output=output)
    assert list(done.values()) == [pricings, measurings]
    assert all(units == came for _, units, came in shown.bars)
    assert_equal(calibration, uninterrupted)


@pytest.mark.parametrize("left", [0, 1])
def test_sequences_that_were_not_measured_after_a_short_prompt_are_not_used(
    tiny: ModelSource, uninterrupted: Calibration, tmp_path: Path, left: int
) -> None:
    """An earlier version counted them as done. Of two sequences, `left` have a KL after a short prompt."""
    output, partial = tmp_path / "calibration", tmp_path / "calibration.partial"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, price_run, "measure_sequence", 4, after=False)
        with pytest.raises(Interruption):
            calibrate(tiny, CORPUS, SETTINGS, BUDGET, show=Shown(), output=output)
    with safe_open(partial, framework="pt") as file:
        metadata, saved = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for packing in PACKINGS:
        assert len(saved[f"priced.measured.{packing}.kl"]) == 2
        kl = saved.pop(f"priced.measured.{packing}.short_kl")
        saved |= {f"priced.measured.{packing}.short_kl": kl[:left].contiguous()} if left else {}
    save_file(saved, partial, metadata=metadata)
    shown = Shown()
    found = calibrate(tiny, CORPUS, SETTINGS, BUDGET, show=shown, output=output)
    assert [bar[0] for bar in shown.bars] == ["Pricing", "Measuring prices"]
    assert_equal(found, uninterrupted)


@pytest.mark.parametrize(
    "change",
    [{"labels": 3}, {"seed": 1}, {"packings": ("sites",)}],
    ids=lambda change: next(iter(change)),
)
def test_what_another_calibration_left_is_not_used(tiny: ModelSource, tmp_path: Path, change: dict[str, Any]) -> None:
    output = tmp_path / "calibration"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, price_run, "measure_sequence", 1, after=False)
        with pytest.raises(Interruption):
            calibrate(tiny, CORPUS, SETTINGS, BUDGET, show=Shown(), output=output)
    shown = Shown()
    calibrate(tiny, CORPUS, dataclasses.replace(SETTINGS, **change), BUDGET, show=shown, output=output)
    assert [bar[0] for bar in shown.bars] == ["Pricing", "Measuring prices"]


def test_all_methods_in_one_file(tiny: ModelSource, uninterrupted: Calibration, tmp_path: Path) -> None:
    """Each is the same as alone, also if the run was interrupted within the second method."""
    settings = dataclasses.replace(SETTINGS, method="all", curves_only=True)
    output = tmp_path / "calibration"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tda_export.calibration.run.SAVE_SECONDS", 0.0)
        interrupt(patch, PartialFile, "save", 3, after=True)
        with pytest.raises(Interruption):
            calibrate(tiny, CORPUS, settings, BUDGET, show=Shown(), output=output)
    shown = Shown()
    both = calibrate(tiny, CORPUS, settings, BUDGET, show=shown, output=output)
    assert shown.bars == [["Measuring prices", 3 + 6 * PASSES, 3 + 6 * PASSES], ["Calibrating", 6, 6]]
    assert_equal(both, uninterrupted)
    alone = calibrate(tiny, CORPUS, dataclasses.replace(settings, method="tda"), {"cett": 0.2}, show=Shown())
    assert torch.equal(both.sums.ratio, alone.sums.ratio)
    write_calibration(both, output)
    read = read_calibration(output)
    assert_equal(read, both)
    assert torch.equal(read.sums.ratio, alone.sums.ratio)


def test_the_table_of_one_packing_is_that_of_both(tiny: ModelSource, uninterrupted: Calibration) -> None:
    alone = calibrate(tiny, CORPUS, dataclasses.replace(SETTINGS, packings=("sites",)), BUDGET, show=Shown())
    assert alone.priced is not None
    assert uninterrupted.priced is not None
    assert list(alone.priced.measured) == ["sites"]
    assert alone.priced.table("sites") == uninterrupted.priced.table("sites")


def test_half_precision(tiny: ModelSource, uninterrupted: Calibration) -> None:
    """Prices count the bytes of stored elements; c² is nearly the same."""
    half = calibrate(tiny, CORPUS, dataclasses.replace(SETTINGS, dtype="bf16"), BUDGET, show=Shown()).priced
    exact = uninterrupted.priced
    assert isinstance(half, Priced)
    assert exact is not None
    assert (half.row_bytes.element_bytes, exact.row_bytes.element_bytes) == (2, 4)
    for name, square in exact.sums.square.items():
        assert float(half.sums.square[name].sum()) == pytest.approx(float(square.sum()), rel=0.5)
    assert half.table("separate").rows[2].price == pytest.approx(2 * exact.table("separate").rows[2].price, rel=0.5)


def test_short_prompts_are_measured_as_if_they_were_the_calibrations_own(
    tiny: ModelSource, uninterrupted: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens are scored, after the end of the prompt, in the first sequences alone."""
    monkeypatch.setattr(price_run, "SHORT_SEQUENCES", 2)
    priced, long = calibrate(tiny, CORPUS, SETTINGS, BUDGET, show=Shown()).priced, uninterrupted.priced
    assert priced is not None
    assert long is not None
    model = tiny.reference().requires_grad_(False)
    row_prices = {packing: priced.sums.row_prices(tiny.spec, packing, priced.row_bytes) for packing in PACKINGS}
    for packing, measured in priced.measured.items():
        by_hand = {packing: measured.empty()}
        for sequence in CORPUS.tokens[1::2][:2]:
            measure_sequence(model, tiny.spec, sequence[7:], 1, {packing: row_prices[packing]}, by_hand)
        assert measured.short_kl is not None
        assert torch.equal(measured.short_kl, by_hand[packing].kl)
        assert torch.equal(measured.kl, long.measured[packing].kl)
        short = priced.table(packing).short
        assert short is not None
        factor = measured.short_kl.mean(dim=0)[1:] / measured.kl[:2].mean(dim=0)[1:]
        assert short.kl[0] == 0
        assert short.kl[1:] == pytest.approx((factor * measured.kl.mean(dim=0)[1:]).tolist())
        assert all(error > 0 for error in short.kl_stderr[1:])


def test_of_one_sequence_the_short_prompt_has_no_error(tiny: ModelSource) -> None:
    few = dataclasses.replace(CORPUS, tokens=CORPUS.tokens[:2])
    priced = calibrate(tiny, few, SETTINGS, BUDGET, show=Shown()).priced
    assert priced is not None
    short = priced.table("sites").short
    assert short is not None
    assert set(short.kl_stderr) == {0.0}


@pytest.mark.parametrize(("prompt", "prefix", "short"), [(256, 0, 32), (256, 1, 32), (7, 0, None), (8, 1, None)])
def test_how_long_a_short_prompt_is(prompt: int, prefix: int, short: int | None) -> None:
    assert short_prompt(prompt, prefix) == short


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_a_short_prompt_keeps_what_the_tokenizer_puts_before_a_text(prefix: int) -> None:
    found = shortened(torch.arange(12), 5, prefix).tolist()
    assert found == [*range(prefix), *range(7 + prefix, 12)]


def test_a_prompt_that_cannot_be_shortened_has_no_other_kl(tiny: ModelSource) -> None:
    settings = dataclasses.replace(SETTINGS, prompt_tokens=7, continuation_tokens=5)
    priced = calibrate(tiny, CORPUS, settings, BUDGET, show=Shown()).priced
    assert priced is not None
    assert priced.prompts is None
    assert priced.table("sites").short is None


@pytest.mark.parametrize("method", ["priced", "all"])
def test_one_sequence_is_too_few(tiny: ModelSource, method: Any) -> None:
    few = dataclasses.replace(CORPUS, tokens=CORPUS.tokens[:1])
    with pytest.raises(UsageError, match=r"^Half of the sequences give prices and the others .*, and 1 is too few"):
        calibrate(tiny, few, dataclasses.replace(SETTINGS, method=method, curves_only=True), BUDGET, show=Shown())


def test_one_token_cannot_be_priced() -> None:
    with pytest.raises(UsageError, match=r"^--continuation-tokens must be at least 2 for prices"):
        dataclasses.replace(SETTINGS, continuation_tokens=1)
