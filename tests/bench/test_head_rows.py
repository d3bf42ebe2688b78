"""benchmarks/head_rows.py: thresholds of the head, bytes, the best of alternatives, and small runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tda_export.models.source import resolve_model
from tda_export.models.spec import DecoderSpec
from tda_export.packing import linear_parts, linear_shape, row_bytes_of
from tests.bench.test_scripts import load
from tests.conftest import TINY_LENGTHS, run_ok
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        return load("head_rows", patch)


@pytest.fixture(scope="module")
def spec(tiny_model: Path) -> DecoderSpec:
    return resolve_model(str(tiny_model)).spec


def test_a_threshold_reads_its_share_of_the_rows(script: ModuleType, tiny_model: Path, spec: DecoderSpec) -> None:
    """On the tokens whose inputs it comes from."""
    model = resolve_model(str(tiny_model)).reference().requires_grad_(False)
    tokens = torch.arange(5, 85).view(2, 40)
    sizes = script.head_sizes(model, spec, tokens, 16)
    inputs = linear_shape(spec, "head")[0]
    assert len(sizes) == 2 * 24 * inputs
    assert script.head_thresholds(sizes, 1.0, inputs) == {}
    rows = script.head_thresholds(sizes, 0.3, inputs)
    caches = [script.read_prompt(model, sequence[:16]) for sequence in tokens]
    with torch.no_grad(), script.dropping(model, spec, rows, 1.0) as count:
        for sequence, cache in zip(tokens, caches, strict=True):
            model(sequence[None, 16:], past_key_values=cache)
    assert float(count.densities(spec)["head"]) == pytest.approx(0.3, abs=0.01)


def test_bytes_of_linears_and_head(script: ModuleType, spec: DecoderSpec) -> None:
    half = {part: torch.full((spec.num_layers,), 0.5) for part in linear_parts(spec)}
    head = spec.vocab_size * spec.hidden_size
    linears = spec.num_layers * sum(
        inputs * outputs for inputs, outputs in (linear_shape(spec, part) for part in linear_parts(spec))
    )
    for density, parts in ((1.0, half), (0.25, half | {"head": torch.tensor([0.25])})):
        found = script.bytes_read(spec, row_bytes_of(spec, 4, None, head=True), parts)
        assert found["linears"] == pytest.approx(0.5)
        assert found["head"] == density
        assert found["both"] == pytest.approx((0.5 * linears + density * head) / (linears + head))


def test_the_best_of_alternatives_counts(script: ModuleType) -> None:
    def row(both: float, kl: float, **more: object) -> dict[str, object]:
        return {"both": both, "kl": kl, "windows": [kl, kl], **more}

    found = {
        "one": [row(0.55, 0.2), row(0.45, 0.4)],
        "other": [row(0.5, 0.6, series=1.0), row(0.5, 0.3, series=0.9), row(0.5, 0.5, series=0.8)],
        "none": [row(0.9, 0.1)],
    }
    (at,) = [row for row in script.compared("float", found, 2) if row["both"] == 0.5]
    assert at["kl"] == {"one": pytest.approx(0.08**0.5), "other": 0.3}
    assert at["to one"] == {"other": [pytest.approx(0.3 / 0.08**0.5), 0.0]}


def test_densities_between_the_measured_ones(script: ModuleType) -> None:
    rows = [
        {"series": density, "sparsity": 0.1, "both": density / 2, "windows": [kl, 4 * kl], "kl": 2.5 * kl}
        for density, kl in ((1.0, 0.1), (0.9, 0.4))
    ]
    found = script.refined(rows)
    assert found[:2] == rows
    assert [row["series"] for row in found[2:]] == pytest.approx([0.975, 0.95, 0.925])
    assert found[3]["windows"] == pytest.approx([0.2, 0.8])
    assert (found[3]["both"], found[3]["kl"]) == (pytest.approx(0.475), pytest.approx(0.5))


@pytest.fixture
def command(
    script: ModuleType, priced_calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """Runs the script for a model, with further options."""
    text = tmp_path / "text.txt"
    text.write_text("The sea is calm to-night. The tide is full, the moon lies fair upon the straits. " * 12)

    def run(model: Path, *options: object) -> int:
        given = [model, "--calibration", priced_calibration, "--text", text, *options]
        monkeypatch.setattr("sys.argv", ["head_rows.py", *map(str, given)])
        status: int = script.main()
        return status

    return run


def test_a_run(
    script: ModuleType,
    command: Callable[..., int],
    tiny_model: Path,
    priced_calibration: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        densities = load("teal_densities", patch)
        given = [tiny_model, "--calibration", priced_calibration, "-o", tmp_path / "d.json", "--sequences", "1"]
        patch.setattr("sys.argv", ["teal_densities.py", *map(str, given)])
        assert densities.main() == 0
    for name, value in (("SMALLEST_PRICE", 1e-6), ("SPARSITIES", (0.0, 0.5)), ("HEAD_DENSITIES", (1.0, 0.5))):
        monkeypatch.setattr(script, name, value)
    options = ("--prompts", 2, "--prompt-tokens", 64, "--points", 3, "--densities", tmp_path / "d.json")
    assert command(tiny_model, *options) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for kind in ("float", "int4"):
        of = {
            way: [row for row in rows if row["weights"] == kind and row.get("way") == way]
            for way in (script.PRICED, script.WHOLE, script.TEAL, script.TEAL_WHOLE)
        }
        assert [len(own) for own in of.values()] == [3, 3, 4, 2]
        for priced, whole in zip(of[script.PRICED], of[script.WHOLE], strict=True):
            assert priced["price"] == whole["price"]
            assert 0 <= priced["head"] <= whole["head"] == 1.0
            assert priced["both"] <= whole["both"]
        assert of[script.TEAL][0]["kl"] == pytest.approx(0.0, abs=1e-5)  # nothing is dropped
        assert all(row["head"] == 1.0 for row in of[script.TEAL_WHOLE])
    assert all(kl > 0 for row in rows if "way" not in row for kl in row["kl"].values())
    assert any("way" not in row for row in rows)


def test_a_calibration_of_another_model(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(save_tiny_model("opt", tmp_path / "opt")) == 2
    assert "is of another model than" in capsys.readouterr().err


def test_a_calibration_without_prices_for_the_head(
    command: Callable[..., int], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ok("calibrate", tiny_model, "-o", tmp_path / "c", "--head", "whole", *TINY_LENGTHS)
    assert command(tiny_model, "--calibration", tmp_path / "c") == 2
    assert "has no prices for the head's rows. Calibrate without --head whole." in capsys.readouterr().err
