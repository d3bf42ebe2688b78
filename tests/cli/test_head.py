"""Prices of the head's rows on the command line: calibrate, build, and the commands that use or leave them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tda_export.calibration.file import read_calibration
from tda_export.evaluation.greedy_densities import GreedyDensities, write_densities
from tda_export.graph import contract
from tda_export.graph.derive import artifact_spec
from tda_export.graph.stored_integers import stored_codes
from tda_export.models.source import resolve_model
from tda_export.packing import packed_matrices
from tda_export.runtime.artifact import open_artifact
from tests.cli.conftest import FAILURE, USAGE, assert_error
from tests.cli.results import result_of
from tests.conftest import TINY_LENGTHS, run_cli, run_ok
from tests.few_prices import few_prices  # noqa: F401 - a fixture
from tests.tiny import save_tiny_model

TEXT = "The tide is full, the moon lies fair upon the straits. " * 20


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of a calibration with --head whole."""
    folder = tmp_path_factory.mktemp("whole")
    printed = run_ok("calibrate", tiny_model, "-o", folder / "c", "--head", "whole", *TINY_LENGTHS).stdout
    assert "head ┃" not in printed
    run_ok("build", tiny_model, "--calibration", folder / "c", "--sparsity", "0.4", "-o", folder / "a")
    return folder / "a"


@pytest.fixture(scope="module")
def priced(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("priced")
    printed = run_ok("calibrate", tiny_model, "-o", folder / "c", *TINY_LENGTHS).stdout
    assert " head ┃" in printed
    run_ok("build", tiny_model, "--calibration", folder / "c", "--sparsity", "0.4", "-o", folder / "a")
    return folder / "a"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def evaluated(artifact: Path, text: Path, *options: object) -> dict[str, float]:
    sizes = ("--prompts", "2", "--prompt-tokens", "24", "--continuation-tokens", "8")
    result: dict[str, float] = result_of("eval", artifact, "--text", text, *sizes, *options)
    return result


def test_the_same_prices_of_all_other_rows(whole: Path, priced: Path) -> None:
    """The head adds its own, and nothing else changes but what all that is skipped costs together."""
    found = {path: read_calibration(path.parent / "c").priced for path in (whole, priced)}
    settings = {path: read_calibration(path.parent / "c").provenance["settings"]["head"] for path in (whole, priced)}
    assert settings == {whole: "whole", priced: "priced"}
    sums = {path: each.sums.square for path, each in found.items() if each is not None}
    assert sums[priced].keys() - sums[whole].keys() == {"head"}
    for name, square in sums[whole].items():
        assert square.equal(sums[priced][name]), name
    tables = {path: open_artifact(path).price_table for path in (whole, priced)}
    rows = list(zip(*(table.rows for table in tables.values() if table is not None), strict=True))
    assert all(one.price == other.price and one.head_share == 1.0 for one, other in rows)
    assert all(one.kl < other.kl and other.head_share < 1.0 for one, other in rows[1:])


def test_what_is_stored(whole: Path, priced: Path) -> None:
    opened = {path: open_artifact(path) for path in (whole, priced)}
    assert [each.prices_head for each in opened.values()] == [False, True]
    assert contract.row_price("head") in opened[priced].manifest["weights"]
    assert contract.row_price("head") not in opened[whole].manifest["weights"]
    assert opened[whole].head.bytes == opened[priced].head.bytes


def test_parts(whole: Path, priced: Path, text: Path) -> None:
    """`layers` leaves the head whole, and so do TEAL and WINA; all else is as in the other artifact."""
    all_of_it, layers = (evaluated(priced, text, "--sparsity", "0.4", "--parts", parts) for parts in ("all", "layers"))
    assert all_of_it["head_share"] < 1.0
    assert layers["head_share"] == 1.0
    assert layers["linear_bytes"] == pytest.approx(all_of_it["linear_bytes"])
    other = evaluated(whole, text, "--sparsity", "0.4")
    assert other["head_share"] == 1.0
    assert layers["kl"] == pytest.approx(other["kl"], rel=1e-3)
    for method in ("teal", "wina"):
        assert evaluated(priced, text, "--method", method, "--sparsity", "0.4")["head_share"] == 1.0


def test_a_budget_by_kl_for_the_layers_alone(priced: Path, text: Path) -> None:
    result = run_cli("eval", priced, "--text", text, "--parts", "layers", "--max-kl", "0.1")
    assert_error(result, USAGE, "--parts layers: KL was measured with all priced linears, so a budget by KL is not")


def test_an_option_without_prices(tiny_model: Path, tmp_path: Path) -> None:
    result = run_cli("calibrate", tiny_model, "-o", tmp_path / "c", "--method", "tda", "--head", "whole")
    assert_error(
        result, USAGE, "--head has no effect with --method tda. Leave it out, or give --method priced, or all."
    )


def test_an_option_of_a_shape(priced: Path) -> None:
    result = run_cli("bench", priced, "--head", "whole")
    assert_error(result, USAGE, "--head is for --shape only; an artifact has its own. Leave it out.")


def test_a_shape_with_masks() -> None:
    result = run_cli("bench", "--shape", "llama-2-7b", "--method", "tda", "--head", "whole")
    assert_error(result, USAGE, "--head has no effect with tda, which reads the head whole. Leave it out.")


def test_printed_shares(priced: Path, whole: Path, text: Path) -> None:
    sizes = ("--prompts", "2", "--prompt-tokens", "24", "--text", text)
    for kind in (("--continuation-tokens", "8"), ("--free", "8")):
        printed = run_ok("eval", priced, *sizes, *kind, "--sparsity", "0.4").stdout
        assert re.search(r"^of the head         0\.\d{3}$", printed, re.MULTILINE)
        assert "of the head" not in run_ok("eval", whole, *sizes, *kind, "--sparsity", "0.4").stdout
    free = result_of("eval", priced, *sizes, "--free", "8", "--sparsity", "0.4")
    assert 0 < free["head_share"] < 1


def test_densities_of_the_layers(priced: Path, text: Path, tmp_path: Path) -> None:
    """For TEAL `layers` and `all` are the same, since it reads the head whole."""
    manifest = open_artifact(priced).manifest
    spec = artifact_spec(open_artifact(priced))
    names = packed_matrices(spec, manifest["packing"])
    paths = [[0.0, 0.5]] * spec.num_layers
    density = {name: [[1.0, 0.5]] * spec.num_layers for name in names}
    found = GreedyDensities(manifest["model"]["fingerprint"], manifest["packing"], "all", paths, density)
    write_densities(found, tmp_path / "d.json")
    given = ("--method", "teal", "--sparsity", "0.4", "--densities", tmp_path / "d.json")
    assert evaluated(priced, text, *given) == evaluated(priced, text, *given, "--parts", "layers")


def test_layers_are_all_of_an_artifact_whose_head_is_whole(whole: Path, text: Path) -> None:
    budget = ("--max-kl", "0.001")
    assert evaluated(whole, text, *budget) == evaluated(whole, text, *budget, "--parts", "layers")


def test_a_head_of_four_bits_cannot_have_prices(tiny_model: Path, tmp_path: Path) -> None:
    lengths = ("--prompt-tokens", "24", "--continuation-tokens", "8", "--sequences", "4")
    model = tmp_path / "model"
    given = ("--weights-for", "head=int4", "--kl-sequences", "2")
    for own, other in (("whole", "priced"), ("priced", "whole")):
        run_ok("quantize", tiny_model, "-o", model, "--head", own, *given, *lengths, "--overwrite")
        result = run_cli("calibrate", model, "-o", tmp_path / own, "--head", other, *lengths)
        lies, needed = ("output", "input") if own == "whole" else ("input", "output")
        words = f"has its head in four bits by {lies}, and it would have to lie by {needed}. Leave it out, or quantise"
        assert_error(result, USAGE, words)
        run_ok("calibrate", model, "-o", tmp_path / own, *lengths)
        assert read_calibration(tmp_path / own).provenance["settings"]["head"] == own


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize(
    ("bits", "stored", "read"),
    [(8, "whole", "priced"), (4, "whole", "whole"), (8, "priced", "whole"), (4, "priced", "")],
)
def test_a_quantised_head(name: str, bits: int, stored: str, read: str, tmp_path: Path) -> None:
    """Codes that lie as they are read are the folder's. Others, of eight bits, are rounded again."""
    lengths = ("--prompt-tokens", "24", "--continuation-tokens", "8", "--sequences", "4")
    model = tmp_path / "model"
    rules = ("--weights-for", f"head=int{bits}", "--kl-sequences", "2", "--head", stored)
    run_ok("quantize", save_tiny_model(name, tmp_path / "float"), "-o", model, *rules, *lengths, "--quiet")
    chosen = ("--head", read) if read and bits == 8 else ()
    run_ok("calibrate", model, "-o", tmp_path / "c", *chosen, *lengths)
    run_ok("build", model, "--calibration", tmp_path / "c", "-o", tmp_path / "a")  # verifies
    opened = open_artifact(tmp_path / "a")
    assert opened.prices_head == ((read or stored) == "priced")
    assert opened.head.format.name == f"int{bits}_g32"
    own = resolve_model(str(model)).codes
    if (read or stored) == stored and "head" in own:
        assert np.array_equal(stored_codes(opened, "head").decode(), own["head"].decode())
    known = [
        result_of("inspect", place, *dtype) for place, dtype in ((model, ("--dtype", "fp32")), (opened.folder, ()))
    ]
    if (read or "priced") == "priced" or bits == 4:  # `inspect` of a model expects what `calibrate` does by default
        assert known[0]["session_bytes"] == known[1]["session_bytes"]


@pytest.mark.parametrize(
    ("change", "words"), [("rows", "matrices.head"), ("no prices", "head.row_price"), ("major", "head.row_price")]
)
def test_a_head_that_does_not_fit(priced: Path, tmp_path: Path, change: str, words: str) -> None:
    copy = shutil.copytree(priced, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    head = manifest["matrices"]["head"]
    if change == "no prices":
        del manifest["weights"]["head.row_price"]
        manifest["graph_weights"] = {file: [] for file in manifest["graph_weights"]}
    elif change == "rows":
        head["rows"] = 58
    else:
        head |= {"major": "output", "rows": head["columns"], "columns": head["rows"]}
        manifest["weights"]["head"]["shape"].reverse()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert_error(run_cli("inspect", copy), FAILURE, words)
