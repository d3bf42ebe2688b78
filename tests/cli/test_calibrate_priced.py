"""`tda-export calibrate` with prices, the default, from end to end on the tiny model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tda_export.calibration.file import read_calibration
from tda_export.models.source import resolve_model
from tda_export.pricing import PriceTable
from tda_export.runtime import load
from tests.cli.conftest import INTERRUPTED, USAGE, assert_error, build
from tests.cli.results import result_of
from tests.conftest import TINY_LENGTHS, run_cli, run_ok
from tests.few_prices import SHARES, few_prices  # noqa: F401 -- a fixture
from tests.runtime.conftest import row_prices


@pytest.fixture(scope="module")
def priced(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The calibration of the default method, and its output."""
    path = tmp_path_factory.mktemp("priced") / "c.safetensors"
    return path, run_ok("calibrate", tiny_model, "-o", path, *TINY_LENGTHS).stdout


def test_the_default(tiny_model: Path, priced: tuple[Path, str]) -> None:
    """It prints a table for each packing, and the bytes read at the budget."""
    path, printed = priced
    calibration = read_calibration(path)
    assert calibration.provenance["budget"] == {"max_kl": 0.05}
    assert calibration.provenance["settings"]["method"] == "priced"
    assert calibration.priced is not None
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines()]
    for name, table in calibration.priced.tables().items():
        assert f"Prices with one threshold a {'matrix' if name == 'separate' else 'site'} ({name})" in printed
        assert ["0 (dense)", "1.000", "1.000", "1.000", "1.000", "0.0000", "1.000"] in cells
        assert table.short is not None
        assert "After prompts of 4 tokens in place of 32" in printed
        for row, short in zip(table.rows[1:], table.after(4).rows[1:], strict=True):
            assert [f"{row.price:.3e}", short.kl_text] in cells
            shares = [f"{share:.3f}" for share in (row.share, row.ffn_share, row.attention_share, row.head_share)]
            kl = f"{row.kl:.4f} ± {row.kl_stderr:.4f}"
            assert [f"{row.price:.3e}", *shares, kl, f"{row.agreement:.3f}"] in cells
        price = table.price_for(max_kl=0.05)
        row = table.predicted(price)
        line = f"{tiny_model}, KL 0.05, {name}: price {price:.4g} reads {row.share:.3f} of the linears' bytes and "
        assert line + f"{row.head_share:.3f} of the head's at KL 0.0500" in printed
    assert f"Calibrated on 4 sequences; wrote {path}" in printed
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_json(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "c"
    options = ("--sparsity", "0.3", "--labels", "3", "--packing", "sites", "--seed", "5", "--refine", "2")
    result = result_of("calibrate", tiny_model, "-o", output, *TINY_LENGTHS, *options)
    assert result["output"] == str(output)
    assert result["budget"] == {"sparsity": 0.3}
    assert result["settings"]["labels"] == 3
    assert result["settings"]["refine_steps"] == 2
    assert result["settings"]["packings"] == ["sites"]
    assert "estimator" not in result["settings"]
    assert "allocation" not in result
    assert list(result["price_tables"]) == ["sites"]
    table = PriceTable.from_dict(result["price_tables"]["sites"])
    calibration = read_calibration(output)
    assert calibration.priced is not None
    assert table == calibration.priced.table("sites")
    assert result["prices"]["sites"]["share"] == pytest.approx(0.7)
    assert result["prices"]["sites"]["price"] == pytest.approx(table.price_for(sparsity=0.3))
    assert float(calibration.priced.sums.tokens) == 2 * 16 * 3
    assert list(calibration.priced.refined) == ["sites"]


def test_build_stores_refined_prices(tiny_model: Path, tmp_path: Path) -> None:
    """So its rows are those of the table."""
    options = ("--sparsity", "0.3", "--refine", "2", "--packing", "separate")
    run_ok("calibrate", tiny_model, "-o", tmp_path / "c", *TINY_LENGTHS, *options)
    run_ok("build", tiny_model, "--calibration", tmp_path / "c", "-o", tmp_path / "a")
    priced, spec = read_calibration(tmp_path / "c").priced, resolve_model(str(tiny_model)).spec
    assert priced is not None
    estimated = priced.sums.row_prices(spec, "separate", priced.row_bytes)
    stored = row_prices(load(tmp_path / "a", provider="cpu"))
    for name, value in priced.row_prices(spec, "separate").items():
        torch.testing.assert_close(stored[name], value)
        assert name == "head" or not torch.equal(value, estimated[name])


def test_it_is_repeatable(tiny_model: Path, tmp_path: Path, priced: tuple[Path, str]) -> None:
    run_ok("calibrate", tiny_model, "-o", tmp_path / "c", *TINY_LENGTHS)
    assert (tmp_path / "c").read_bytes() == priced[0].read_bytes()


def test_all_methods(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build with masks from it is the same as from a calibration of masks alone."""
    monkeypatch.setattr("tda_export.calibration.kl_plan.SHARES", (0.7, 0.5))
    output = tmp_path / "c"
    options = ("--method", "all", "--sparsity", "0.3")
    result = result_of("calibrate", tiny_model, "-o", output, *TINY_LENGTHS, *options)
    assert result["prices"]["separate"]["share"] == pytest.approx(0.7)
    assert result["allocation"]["sparsity"] == pytest.approx(0.3, abs=0.02)
    assert result["predicted_kl"]
    for method, budget in (("tda", {"sparsity": 0.3, "allocation": "kl"}), ("priced", {"sparsity": 0.3})):
        options = ("--method", method, "--calibration", output, "--no-verify")
        assert result_of("build", tiny_model, *options, "-o", tmp_path / method)["budget"] == budget


def test_interrupted_and_started_again(
    tiny_model: Path, tmp_path: Path, priced: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tda_export.calibration.price_run.measure_sequence", interrupt)
        result = run_cli("calibrate", tiny_model, "-o", tmp_path / "c", *TINY_LENGTHS)
        assert (result.exit_code, result.stderr.endswith("Interrupted.\n")) == (INTERRUPTED, True)
    assert [path.name for path in tmp_path.iterdir()] == ["c.partial"]
    monkeypatch.setattr("tda_export.calibration.price_run.price_continuation", interrupt)  # not needed again
    run_ok("calibrate", tiny_model, "-o", tmp_path / "c", *TINY_LENGTHS)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert (tmp_path / "c").read_bytes() == priced[0].read_bytes()


def interrupt(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("option", "budget"), [("--sparsity", "sparsity"), ("--max-kl", "max_kl")])
def test_a_budget_that_is_just_missed_becomes_the_nearest(
    tiny_model: Path, tmp_path: Path, option: str, budget: str
) -> None:
    """The measurements are kept, with a budget that every table can meet."""
    output, asked = tmp_path / "c", {"sparsity": 0.79, "max_kl": 50.0}[budget]
    result = run_ok("calibrate", tiny_model, "-o", output, *TINY_LENGTHS, option, asked)
    calibration = read_calibration(output)
    most = calibration.provenance["budget"][budget]
    assert list(calibration.provenance["budget"]) == [budget]
    assert 0 < most < asked
    assert f"The measured prices reach {'KL' if budget == 'max_kl' else budget} " in result.stderr
    assert f"not {asked}: that is the file's budget.\n" in result.stderr
    assert calibration.priced is not None
    for table in calibration.priced.tables().values():
        assert 0 < table.price_for(**{budget: most}) <= table.most_price


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--estimator", "token"], "no effect with --method priced. Leave it out, or give --method tda, or all"),
        (["--estimator", "prompt"], "--estimator has no effect with --method priced"),
        (["--curves-only"], "--curves-only has no effect with --method priced"),
        (["--prior-tokens", "64"], "--prior-tokens has no effect with --method priced"),
        (["--cett", "0.2"], "--cett has no effect with --method priced"),
        (["--sparsity", "0.3", "--allocation", "kl"], "--allocation has no effect with --method priced"),
        (["--method", "tda", "--labels", "2"], "--labels has no effect with --method tda. Leave it out"),
        (["--method", "tda", "--packing", "sites"], "--packing has no effect with --method tda"),
        (["--method", "all", "--cett", "0.2"], "are budgets of masks. Give --sparsity or --max-kl, or --method tda"),
        (["--sparsity", "0.9"], "Sparsity 0.9 is more than prices are measured at (about 0.7). Give a lower"),
        (["--sparsity", "0.3", "--max-kl", "0.1"], "Give exactly one budget"),
        (["--sequences", "1"], "and 1 is too few for that. Give --sequences 2 or more and text for them"),
        (["--continuation-tokens", "1"], "--continuation-tokens must be at least 2 for prices"),
        (["--labels", "0"], "--labels"),
        (["--refine", "-1"], "--refine"),
        (["--method", "tda", "--refine", "60"], "--refine has no effect with --method tda. Leave it out"),
        (["--packing", "pairs"], "'pairs' is not one of"),
        (["--method", "griffin"], "'griffin' is not one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_options_that_are_refused(outputs: Path, tiny_model: Path, options: list[str], text: str) -> None:
    assert_error(run_cli("calibrate", tiny_model, "-o", outputs / "x", *TINY_LENGTHS, *options), USAGE, text)


def test_masks_are_not_built_from_prices(outputs: Path, tiny_model: Path, priced: tuple[Path, str]) -> None:
    result = build(tiny_model, priced[0], outputs / "x", "--method", "tda")
    assert_error(result, USAGE, "contains no CETT curves. Calibrate again with 'tda-export calibrate --method tda'")


def test_an_earlier_calibration_is_replaced(tiny_calibration: Path, tiny_model: Path, tmp_path: Path) -> None:
    """A calibration of either method is."""
    shutil.copy(tiny_calibration, tmp_path / "c")
    run_ok("calibrate", tiny_model, "-o", tmp_path / "c", *TINY_LENGTHS, "--packing", "sites", "--overwrite")
    assert read_calibration(tmp_path / "c").priced is not None
