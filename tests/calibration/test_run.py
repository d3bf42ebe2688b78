"""The settings of a calibration run and its record."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tda_export
from tda_export.calibration import kl_run
from tda_export.calibration import run as run_module
from tda_export.calibration.corpus import Corpus
from tda_export.calibration.curves import CurveAccumulator, CurveSums
from tda_export.calibration.file import Calibration
from tda_export.calibration.kl_path import STEPS, WARM_UP, PathSearch, PathState
from tda_export.calibration.kl_table import SHARES, KlTable
from tda_export.calibration.resume import PartialFile
from tda_export.calibration.run import CalibrationSettings, calibrate
from tda_export.errors import UsageError
from tda_export.models.source import ModelSource, resolve_model
from tests.calibration.shown import Shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_tokens": 1}, r"^--prompt-tokens must be at least 2: the first token does not count\.$"),
        ({"continuation_tokens": 0}, r"^--continuation-tokens must be at least 1\.$"),
        (
            {"method": "tda", "sequences": 1},
            r"and 1 is too few for that\. Give --sequences 2 or more and text for them, or --curves-only",
        ),
        ({"dtype": "fp16"}, r"^--dtype fp16 on the CPU is slow and imprecise\. Use fp32, or --device cuda\.$"),
    ],
)
def test_invalid_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CalibrationSettings(**arguments)


@pytest.mark.parametrize("device", ["gpu", "", "mps", "CUDA", "cuda:", "cuda:one", "cuda:-1", "cuda:0:1", "cpu:0"])
def test_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(UsageError, match=rf"^--device {device} is not known\. Use cpu, cuda, cuda:N or auto\.$"):
        CalibrationSettings(device=device)


@pytest.mark.parametrize(
    ("gpus", "device", "found"),
    [(0, "cuda", "no"), (0, "cuda:0", "no"), (1, "cuda:1", "1"), (2, "cuda:2", "2"), (2, "cuda:10", "2")],
)
def test_device_that_is_not_there_is_refused(
    gpus: int, device: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    message = rf"^--device {device}: PyTorch finds {found} CUDA GPU here\. Use --device cpu\.$"
    with pytest.raises(UsageError, match=message):
        CalibrationSettings(device=device)


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:0", "cuda:1"])
def test_device_that_is_there_is_taken(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert CalibrationSettings(device=device).device == device


def test_half_precision_is_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert CalibrationSettings(device="cuda", dtype="fp16").dtype == "fp16"


def test_smallest_settings_are_allowed() -> None:
    assert CalibrationSettings(method="tda", prompt_tokens=2, continuation_tokens=1, sequences=2).length == 3
    assert CalibrationSettings(method="tda", sequences=1, curves_only=True).sequences == 1


CORPUS = Corpus(torch.arange(5, 77).reshape(6, 12), "some.txt", "0" * 64)
SETTINGS = CalibrationSettings(method="tda", prompt_tokens=8, continuation_tokens=4, sequences=6)
BUDGET = {"sparsity": 0.5, "allocation": "kl"}


def equal(one: Calibration, other: Calibration) -> bool:
    assert (one.kl is None) == (other.kl is None)
    pairs = [(one.grid, other.grid)]
    pairs += [(getattr(one.sums, field.name), getattr(other.sums, field.name)) for field in fields(CurveSums)]
    if one.kl is not None:
        pairs += [(getattr(one.kl, field.name), getattr(other.kl, field.name)) for field in fields(KlTable)]
    return all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.fixture(autouse=True)
def _no_save_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves are saved once, when they are complete, also on a slow machine, because tests count saves."""
    monkeypatch.setattr(run_module, "SAVE_SECONDS", math.inf)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> ModelSource:
    return resolve_model(str(tiny_model))


@pytest.fixture(scope="module")
def uninterrupted(tiny: ModelSource) -> Calibration:
    return calibrate(tiny, CORPUS, SETTINGS, BUDGET, show=Shown())


@pytest.mark.parametrize("curves_only", [True, False], ids=["curves", "path"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_calibration_records_where_it_came_from(tiny: ModelSource, dtype: Any, curves_only: bool) -> None:
    settings = dataclasses.replace(SETTINGS, dtype=dtype, curves_only=curves_only, prior_tokens=16)
    shown = Shown()
    calibration = calibrate(tiny, CORPUS, settings, {"cett": 0.2}, show=shown)
    assert [bar[0] for bar in shown.bars] == ["Calibrating"] + ["Allocating"] * (not curves_only)
    assert shown.bars[0] == ["Calibrating", 6, 6]
    assert all(units == came for _, units, came in shown.bars)
    assert calibration.model_fingerprint == tiny.fingerprint
    provenance = calibration.provenance
    assert provenance["model"]["architecture"] == "LlamaForCausalLM"
    assert provenance["dataset"] == {"name": "some.txt", "sequences": 6, "tokens_sha256": "0" * 64}
    of_prices = {"labels", "packings", "head", "refine_steps"}
    assert provenance["settings"] == {k: v for k, v in asdict(settings).items() if k not in of_prices}
    assert provenance["budget"] == {"cett": 0.2}
    assert provenance["versions"]["tda-export"] == tda_export.__version__
    assert "torch" in provenance["versions"]
    assert calibration.sums.mean_cett.isfinite().all()
    assert calibration.sums.sequences.tolist() == [6]
    assert (calibration.kl is None) == curves_only
    if calibration.kl is not None:
        assert calibration.kl.prior_tokens.tolist() == [16.0]
        assert all(getattr(calibration.kl, field.name).isfinite().all() for field in fields(KlTable))


# An interrupted run


class Interruption(Exception):
    """Raised by a test to end a run."""


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, call: int, *, after: bool) -> None:
    """Raise in the given call of a method, before or after its work."""
    calls, original = itertools.count(), getattr(owner, method)

    def interrupted(*arguments: Any) -> Any:
        due = next(calls) == call
        if due and not after:
            raise Interruption
        result = original(*arguments)
        if due:
            raise Interruption
        return result

    monkeypatch.setattr(owner, method, interrupted)


def calls_of(monkeypatch: pytest.MonkeyPatch, owner: type, method: str) -> list[tuple[Any, ...]]:
    """Record the arguments of the calls of a method."""
    calls, original = list[tuple[Any, ...]](), getattr(owner, method)

    def recorded(self: Any, *arguments: Any) -> Any:
        calls.append(arguments)
        return original(self, *arguments)

    monkeypatch.setattr(owner, method, recorded)
    return calls


def steps_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the steps of the sweep."""
    steps, original = list[int](), PathSearch.advance

    def recorded(self: PathSearch, state: PathState) -> Any:
        steps.append(state.step)
        return original(self, state)

    monkeypatch.setattr(PathSearch, "advance", recorded)
    return steps


@pytest.mark.parametrize("step", [0, 1, 9, 23])
@pytest.mark.parametrize(
    ("owner", "method", "after", "lost"),
    [(PathSearch, "advance", False, 0), (PathSearch, "advance", True, 1), (PartialFile, "save", True, 0)],
    ids=["before a step", "before its state is kept", "after its state is kept"],
)
def test_an_interrupted_run_goes_on_where_it_was(
    tiny: ModelSource,
    uninterrupted: Calibration,
    tmp_path: Path,
    step: int,
    owner: type,
    method: str,
    after: bool,
    lost: int,
) -> None:
    output = tmp_path / "calibration.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, owner, method, step, after=after)
        with pytest.raises(Interruption):
            calibrate(tiny, CORPUS, SETTINGS, BUDGET, show=Shown(), output=output)
    partial = tmp_path / "calibration.safetensors.partial"
    assert [path.name for path in tmp_path.iterdir()] == [partial.name]
    with pytest.MonkeyPatch.context() as patch:
        steps, shown = steps_of(patch), Shown()
        calibration = calibrate(tiny, CORPUS, SETTINGS, BUDGET, show=shown, output=output)
    assert steps == list(range(step, WARM_UP + STEPS))  # the first save has the curves
    assert [bar[0] for bar in shown.bars] == ["Allocating"]
    assert shown.bars[0][1] == shown.bars[0][2]
    assert equal(calibration, uninterrupted)


@pytest.mark.parametrize("estimator", ["prompt", "token"])
@pytest.mark.parametrize(
    ("owner", "method", "call", "after", "kept"),
    [
        (kl_run._Measuring, "measure", 0, False, 0),
        (kl_run._Measuring, "measure", 3, True, 3),  # before the row is kept
        (PartialFile, "save", 1 + WARM_UP + STEPS + 3, True, 4),
        (kl_run._Measuring, "_sensitivities", 5, False, 5),
        (PartialFile, "save", 1 + WARM_UP + STEPS + len(SHARES) - 1, True, len(SHARES)),
    ],
    ids=["before the first", "before the fourth is kept", "after the fourth", "within the sixth", "after the last"],
)
def test_an_interruption_of_measuring_repeats_no_setting(
    tiny: ModelSource, tmp_path: Path, estimator: Any, owner: type, method: str, call: int, after: bool, kept: int
) -> None:
    settings = dataclasses.replace(SETTINGS, estimator=estimator)
    uninterrupted = calibrate(tiny, CORPUS, settings, BUDGET, show=Shown())
    output = tmp_path / "calibration.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, owner, method, call, after=after)
        with pytest.raises(Interruption):
            calibrate(tiny, CORPUS, settings, BUDGET, show=Shown(), output=output)
    with pytest.MonkeyPatch.context() as patch:
        steps, measured, shown = steps_of(patch), calls_of(patch, kl_run._Measuring, "measure"), Shown()
        calibration = calibrate(tiny, CORPUS, settings, BUDGET, show=shown, output=output)
    assert steps == []
    assert [share for _, share in measured] == list(SHARES[kept:])
    assert [bar[0] for bar in shown.bars] == ["Allocating"]
    assert shown.bars[0][1] == shown.bars[0][2]
    assert equal(calibration, uninterrupted)


@pytest.mark.parametrize("estimator", ["prompt", "token"])
@pytest.mark.parametrize("curves_only", [True, False], ids=["curves", "path"])
@pytest.mark.parametrize("every", [True, False], ids=["kept each time", "kept twice"])
def test_an_interruption_of_the_curves_repeats_no_sequence_that_was_kept(
    tiny: ModelSource, tmp_path: Path, estimator: Any, curves_only: bool, every: bool
) -> None:
    settings = dataclasses.replace(SETTINGS, estimator=estimator, curves_only=curves_only)
    uninterrupted = calibrate(tiny, CORPUS, settings, BUDGET, show=Shown())
    output, layers = tmp_path / "calibration.safetensors", tiny.spec.num_layers
    with pytest.MonkeyPatch.context() as patch:
        # The clock ticks each time it is read: once at the beginning, after each sequence, and after each save.
        patch.setattr(run_module, "time", SimpleNamespace(monotonic=itertools.count().__next__))
        patch.setattr(run_module, "SAVE_SECONDS", 1 if every else 2)
        interrupt(patch, CurveAccumulator, "add", 4 * layers + 1, after=True)  # within the fifth sequence
        with pytest.raises(Interruption):
            calibrate(tiny, CORPUS, settings, BUDGET, show=Shown(), output=output)
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.safetensors.partial"]
    with pytest.MonkeyPatch.context() as patch:
        added, shown = calls_of(patch, CurveAccumulator, "add"), Shown()
        calibration = calibrate(tiny, CORPUS, settings, BUDGET, show=shown, output=output)
    assert len(added) == 2 * layers
    assert shown.bars[0] == ["Calibrating", 6, 6]
    assert equal(calibration, uninterrupted)


def test_short_runs_keep_curves_only_when_they_are_complete(
    tiny: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving must take little of the time."""
    saved = calls_of(monkeypatch, PartialFile, "save")
    settings = dataclasses.replace(SETTINGS, curves_only=True)
    calibrate(tiny, CORPUS, settings, {"cett": 0.2}, show=Shown(), output=tmp_path / "calibration.safetensors")
    assert [int(sums.sequences) for sums, *_ in saved] == [6]


def test_complete_curves_are_not_read_again(tiny: ModelSource, tmp_path: Path) -> None:
    """For example after a failure to write the calibration."""
    settings, output = dataclasses.replace(SETTINGS, curves_only=True), tmp_path / "calibration.safetensors"
    first = calibrate(tiny, CORPUS, settings, {"cett": 0.2}, show=Shown(), output=output)
    shown = Shown()
    assert equal(calibrate(tiny, CORPUS, settings, {"cett": 0.2}, show=shown, output=output), first)
    assert shown.bars == []


def test_one_sequence_is_enough_for_curves_alone(tiny: ModelSource) -> None:
    corpus = Corpus(CORPUS.tokens[:1], "some.txt", "0" * 64)
    settings = dataclasses.replace(SETTINGS, sequences=1, curves_only=True)
    assert calibrate(tiny, corpus, settings, {"cett": 0.2}, show=Shown()).sums.sequences.tolist() == [1]
    with pytest.raises(UsageError, match="1 is too few for that"):  # the text is too short
        calibrate(tiny, corpus, SETTINGS, BUDGET, show=Shown())


def leave_partial(source: ModelSource, output: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, PathSearch, "advance", 5, after=False)
        with pytest.raises(Interruption):
            calibrate(source, CORPUS, SETTINGS, BUDGET, show=Shown(), output=output)


@pytest.mark.parametrize(
    ("settings", "corpus"),
    [
        (dataclasses.replace(SETTINGS, seed=1), CORPUS),
        (dataclasses.replace(SETTINGS, prior_tokens=0), CORPUS),
        (SETTINGS, Corpus(CORPUS.tokens.flip(0), "some.txt", "1" * 64)),
    ],
    ids=["seed", "prior", "data"],
)
def test_what_another_calibration_left_is_not_used(
    tiny: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: CalibrationSettings, corpus: Corpus
) -> None:
    output = tmp_path / "calibration.safetensors"
    leave_partial(tiny, output)
    steps, shown = steps_of(monkeypatch), Shown()
    calibration = calibrate(tiny, corpus, settings, BUDGET, show=shown, output=output)
    assert [bar[0] for bar in shown.bars] == ["Calibrating", "Allocating"]
    assert steps[0] == 0
    assert equal(calibration, calibrate(tiny, corpus, settings, BUDGET, show=Shown()))


def test_what_another_version_left_is_not_used(
    tiny: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "calibration.safetensors"
    leave_partial(tiny, output)
    monkeypatch.setattr(tda_export, "__version__", "99.0")
    steps = steps_of(monkeypatch)
    calibrate(tiny, CORPUS, SETTINGS, BUDGET, show=Shown(), output=output)
    assert steps[0] == 0


def test_another_budget_goes_on_all_the_same(
    tiny: ModelSource, uninterrupted: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path does not depend on the budget."""
    output = tmp_path / "calibration.safetensors"
    leave_partial(tiny, output)
    steps = steps_of(monkeypatch)
    calibration = calibrate(tiny, CORPUS, SETTINGS, {"max_kl": 0.5}, show=Shown(), output=output)
    assert steps[0] == 5
    assert equal(calibration, uninterrupted)
    assert calibration.provenance["budget"] == {"max_kl": 0.5}


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "folder"])
def test_a_damaged_partial_file_is_not_used(
    tiny: ModelSource, uninterrupted: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    output = tmp_path / "calibration.safetensors"
    leave_partial(tiny, output)
    partial = PartialFile(output, {}).path
    content = {"cut": partial.read_bytes()[:-100], "empty": b"", "text": b"text"}
    partial.write_bytes(content.get(damage, b""))
    if damage == "folder":
        partial.unlink()
        partial.mkdir()
        assert PartialFile(output, {}).load() is None
        return
    steps = steps_of(monkeypatch)
    assert equal(calibrate(tiny, CORPUS, SETTINGS, BUDGET, show=Shown(), output=output), uninterrupted)
    assert steps[0] == 0


def test_removing_a_partial_file_twice(tmp_path: Path, uninterrupted: Calibration) -> None:
    partial = PartialFile(tmp_path / "x", {"a": 1})
    partial.save(uninterrupted.sums)
    loaded = partial.load()
    assert loaded is not None
    assert torch.equal(loaded[0].ratio, uninterrupted.sums.ratio)
    assert loaded[1] is None
    assert PartialFile(tmp_path / "x", {"a": 2}).load() is None
    partial.remove()
    partial.remove()
    assert partial.load() is None
    assert list(tmp_path.iterdir()) == []
