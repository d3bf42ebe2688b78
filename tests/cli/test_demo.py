"""`tda-export demo` on what lies in its folder: a tiny artifact in place of the built-in model's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tda_export.cli import demo
from tda_export.runtime import Model, load
from tests.cli.conftest import USAGE, assert_error
from tests.conftest import run_cli, run_ok


@pytest.fixture
def folder(priced_artifact: Path, priced_calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(priced_artifact, tmp_path / demo.MODEL)
    shutil.copy(priced_calibration, tmp_path / f"{demo.MODEL}.calibration.safetensors")
    monkeypatch.setattr(demo, "PROMPT", "The sea is calm tonight")
    monkeypatch.setattr(demo, "MAX_KL", 0.0001)
    monkeypatch.setattr(demo, "NEW_TOKENS", 12)
    return tmp_path


def text_of(model: Model, **budget: float) -> str:
    generation = model.generate(demo.PROMPT, chat=True, max_new_tokens=12, deployment=model.at(**budget))
    list(generation)
    return generation.text


def test_it_uses_what_is_there_and_compares_two_budgets(folder: Path) -> None:
    output = run_ok("demo", "--artifacts", folder).stdout
    assert f"Using {folder / demo.MODEL}\n" in output
    assert f"Using {folder / demo.MODEL}.calibration.safetensors\n" in output
    model = load(folder / demo.MODEL)
    for name, budget in (("dense", {"price": 0.0}), ("KL 0.0001", {"max_kl": 0.0001})):
        assert f"\n{name}\n{text_of(model, **budget)}" in output
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    assert [row[0] for row in cells] == ["dense", "KL 0.0001", "sparsity 0.5"]
    prices, sparsities, mib, kls, agreement = ([float(row[i]) for row in cells] for i in range(1, 6))
    assert prices == pytest.approx([0.0, model.at(max_kl=0.0001).price, model.at(sparsity=0.5).price], rel=1e-2)
    assert sparsities == [0.0, round(1 - model.at(max_kl=0.0001).share, 3), 0.5]
    dense = model.artifact.linear_bytes / 2**20
    assert mib == pytest.approx([dense * (1 - sparsity) for sparsity in sparsities], abs=0.06)
    assert (kls[0], agreement[0]) == (0.0, 1.0)


def test_an_artifact_of_masks_is_not_the_demos(tiny_artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_artifact, tmp_path / demo.MODEL)
    text = "has masks, and the demo is of prices. Give another folder with --artifacts."
    assert_error(run_cli("demo", "--artifacts", tmp_path), USAGE, text)
    assert [path.name for path in tmp_path.iterdir()] == [demo.MODEL]
