"""`tda-export report`: one page from a calibration or an artifact, and errors."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tda_export.calibration.file import DIGEST_KEY, METADATA_KEY
from tda_export.files import sha256
from tda_export.graph import contract
from tests.cli.conftest import FAILURE, USAGE, assert_error, listing
from tests.conftest import CALIBRATE_TINY, TINY_LENGTHS, run_cli, run_ok
from tests.report.test_results import CONTENT
from tests.report.test_results_file import lines, table_rows
from tests.runtime.conftest import edit_manifest

MARKUP = "<script>alert('x')</script>"


def parse(path: Path) -> ET.Element:
    html = path.read_text(encoding="utf-8")
    outside = r"<(script|link|iframe)\b|@import|url\(|https?:"
    assert not re.search(outside, html.replace("http://www.w3.org/2000/svg", ""))
    return ET.fromstring(html.removeprefix("<!DOCTYPE html>"))


OPENING, LAST = "In short", "Provenance"
MASKS = ["Allocation", "Curves", "Sensitivity of layers"]
CALIBRATED = [OPENING, *MASKS, LAST]
METHODS = "Quality against bytes"
ACTIVITY = ["Neuron activity", "Similarity of prompts", "History-related uncertainty"]


def headings(root: ET.Element) -> list[str]:
    return [heading.text or "" for heading in root.iter("h2")]


def text_of(root: ET.Element) -> str:
    return " ".join("".join(root.itertext()).split())


def leads(root: ET.Element) -> list[str]:
    return [text_of(paragraph) for paragraph in root.iter("p") if paragraph.get("class") == "lead"]


def write_result(folder: Path, name: str, **changes: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps(CONTENT | changes))
    return path


def edited(calibration: Path, path: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """Copy a calibration with other metadata."""
    with safe_open(calibration, framework="pt") as file:
        metadata = json.loads(file.metadata()[METADATA_KEY])
    metadata.pop(DIGEST_KEY)
    edit(metadata)
    save_file(load_file(calibration), path, metadata={METADATA_KEY: json.dumps(metadata)})
    return path


def test_calibration(tiny_calibration: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    assert run_ok("report", tiny_calibration, "-o", output).stdout.startswith(f"Wrote {output} (")
    root = parse(output)
    assert headings(root) == CALIBRATED
    text = text_of(root)
    with safe_open(tiny_calibration, framework="pt") as file:
        metadata = json.loads(file.metadata()[METADATA_KEY])
    assert metadata["model"]["fingerprint"] in text
    assert metadata["dataset"]["tokens_sha256"] in text
    assert "sparsity 0.5" in text
    assert "contains no measurements of KL" not in text
    assert "Predicted KL to dense:" in text


def test_curves_alone(tiny_model: Path, tmp_path: Path) -> None:
    calibration = tmp_path / "curves.safetensors"
    run_ok("calibrate", tiny_model, "-o", calibration, *CALIBRATE_TINY, "--curves-only")
    output = tmp_path / "report.html"
    run_ok("report", calibration, "-o", output)
    root = parse(output)
    assert "contains no measurements of KL" in text_of(root)
    assert re.fullmatch(
        r"A token reads \d+% of the bytes of the FFN, and an FFN's output is off by 0\.\d\d of its length \(CETT, mean "
        r"over layers\). KL was not measured.",
        *leads(root),
    )


def test_stored_budget_beyond_the_path(tiny_calibration: Path, tmp_path: Path) -> None:
    """`calibrate --sparsity 0.95` leaves such a file. The report draws what it can."""
    calibration = edited(
        tiny_calibration, tmp_path / "c.safetensors", lambda metadata: metadata["budget"].update(sparsity=0.95)
    )
    output = tmp_path / "report.html"
    run_ok("report", calibration, "-o", output, "--results", write_result(tmp_path, "r.json"))
    root = parse(output)
    assert headings(root) == [OPENING, METHODS, *MASKS, LAST]
    assert "The stored budget (sparsity 0.95, allocation kl) cannot be met with this calibration" in text_of(root)


def test_artifact_with_refreshes(tiny_model: Path, tiny_calibration: Path, tmp_path: Path) -> None:
    """The page shows the allocation that was built, that of the steps between refreshes."""
    artifact, output = tmp_path / "a", tmp_path / "report.html"
    budget = ("--method", "tda", "--sparsity", 0.5, "--refresh", 5)
    run_ok("build", tiny_model, *budget, "--calibration", tiny_calibration, "--no-verify", "-o", artifact)
    run_ok("report", artifact, "-o", output)
    text = text_of(parse(output))
    assert "Budget: sparsity 0.5, allocation kl, with a refresh every 5 tokens." in text
    assert "FFN sparsity between refreshes 0.62" in text
    manifest = json.loads((artifact / contract.MANIFEST_FILE).read_text())
    assert all(f"{threshold:.6f}" in text for threshold in manifest["thresholds"])


def test_artifact(tiny_artifact: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    result = run_ok("report", tiny_artifact, "-o", output, "--results", write_result(tmp_path, "r.json"))
    root = parse(output)
    assert headings(root) == [OPENING, METHODS, *MASKS, *ACTIVITY, LAST]
    assert sha256(tiny_artifact / contract.DECODE_FILE) in text_of(root)
    assert output.stat().st_size < 3_000_000
    assert "Traceback" not in result.stderr


PRICES = ["Densities of rows", "Prices of rows"]


def test_calibration_of_prices(priced_calibration: Path, tmp_path: Path) -> None:
    """It has neither curves nor masks."""
    output = tmp_path / "report.html"
    run_ok("report", priced_calibration, "-o", output, "--results", write_result(tmp_path, "r.json"))
    root = parse(output)
    assert headings(root) == [OPENING, METHODS, *PRICES, LAST]
    text = text_of(root)
    assert "One threshold a matrix: the budget asks for price" in text
    assert "One threshold a site: the budget asks for price" in text
    assert "which reads 0.500 of the linears' bytes" in text


def test_artifact_of_prices(priced_artifact: Path, tmp_path: Path) -> None:
    """The report runs no graph."""
    output = tmp_path / "report.html"
    run_ok("report", priced_artifact, "-o", output, "--results", write_result(tmp_path, "r.json"))
    root = parse(output)
    assert headings(root) == [OPENING, METHODS, *PRICES, LAST]
    assert text_of(root).count("the budget asks for price") == 1
    text = f"{priced_artifact} has prices, and its report runs no graph. Leave --provider out."
    output = tmp_path / "other.html"
    assert_error(run_cli("report", priced_artifact, "-o", output, "--provider", "cpu"), USAGE, text)


def test_artifacts_of_prices_that_know_less(priced_artifact: Path, tmp_path: Path) -> None:
    """Without its calibration file, the page has the manifest's table; without that, a summary."""
    artifact = Path(shutil.copytree(priced_artifact, tmp_path / "artifact"))
    (artifact / contract.CALIBRATION_FILE).unlink()
    edit_manifest(artifact, lambda manifest: manifest["files"].pop(contract.CALIBRATION_FILE))
    run_ok("report", artifact, "-o", tmp_path / "table.html")
    assert headings(parse(tmp_path / "table.html")) == [OPENING, *PRICES, LAST]
    edit_manifest(artifact, lambda manifest: manifest.update(price_table=None))
    run_ok("report", artifact, "-o", tmp_path / "bare.html")
    bare = parse(tmp_path / "bare.html")
    assert headings(bare) == [OPENING, LAST]
    assert re.match(r"A token reads the rows that are worth price \S+ a byte. What that saves and costs", *leads(bare))


def test_calibration_of_all_methods(tiny_model: Path, tmp_path: Path) -> None:
    calibration, output = tmp_path / "all.safetensors", tmp_path / "report.html"
    run_ok("calibrate", tiny_model, "-o", calibration, "--sparsity", 0.4, "--method", "all", *TINY_LENGTHS)
    run_ok("report", calibration, "-o", output)
    root = parse(output)
    assert headings(root) == [OPENING, *PRICES, *MASKS, LAST]
    assert len(leads(root)) == 2


def test_artifact_without_thresholds_and_calibration(tiny_model: Path, tmp_path: Path) -> None:
    """Griffin's artifact chooses neurons by their number."""
    artifact, output = tmp_path / "griffin", tmp_path / "report.html"
    run_ok("build", tiny_model, "--method", "griffin", "--sparsity", 0.5, "-o", artifact, "--no-verify")
    run_ok("report", artifact, "-o", output)
    root = parse(output)
    assert headings(root) == [OPENING, *ACTIVITY, LAST]
    assert re.fullmatch(
        r"A token reads 50% of the bytes of the FFN \(\d of \d MiB\). What that costs was not measured.", *leads(root)
    )


def test_results(tiny_calibration: Path, tmp_path: Path) -> None:
    files = [
        write_result(tmp_path, "a.json", kl=0.3),
        write_result(tmp_path, "b.json", kl=0.1, ffn_bytes=80.0),
        write_result(tmp_path, "c.json", prompt_tokens=64, text=MARKUP, model=MARKUP, budget={MARKUP: MARKUP}),
        write_result(tmp_path, "d.json", method="dense", budget={}, kl=0.0),
    ]
    output = tmp_path / "report.html"
    run_ok("report", tiny_calibration, "-o", output, *(word for file in files for word in ("--results", file)))
    root = parse(output)
    assert headings(root)[:2] == [OPENING, METHODS]
    captions = [caption.text or "" for caption in root.iter("figcaption")]
    assert (
        sum("decoded. Bars: one standard error" in caption for caption in captions) == 2
    )  # one chart for each text and length
    assert "0.3000 ± 0.0100" in text_of(root)
    assert "no place on a logarithmic axis" in text_of(root)


def test_rows_of_several_results(tiny_calibration: Path, tmp_path: Path) -> None:
    rows, output = tmp_path / "rows.jsonl", tmp_path / "report.html"
    rows.write_text(lines(table_rows()))
    run_ok("report", tiny_calibration, "-o", output, "--results", rows)
    captions = [caption.text or "" for caption in parse(output).iter("figcaption")]
    about = "FFN bytes: smollm2-135m on stories, prompts of 32 tokens and 128 decoded. Bars: one standard error."
    assert [caption for caption in captions if "decoded" in caption] == [about]


def test_names_are_escaped(tiny_calibration: Path, tmp_path: Path) -> None:
    def rename(metadata: dict[str, Any]) -> None:
        metadata["model"]["name"] = f"{MARKUP}\x00"

    calibration = edited(tiny_calibration, tmp_path / "<b>&.safetensors", rename)
    output = tmp_path / "report.html"
    run_ok("report", calibration, "-o", output)
    root = parse(output)
    assert root.findtext(".//h1") == f"{MARKUP}\ufffd: calibration"
    assert "<b>&.safetensors" in text_of(root)


def test_same_input_gives_the_same_page(tiny_calibration: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run_ok("report", tiny_calibration, "-o", tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# Refusals


def test_existing_output(tiny_calibration: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    run_ok("report", tiny_calibration, "-o", output)
    assert_error(run_cli("report", tiny_calibration, "-o", output), USAGE, "report.html exists", "--overwrite")
    before = output.read_bytes()
    run_ok("report", tiny_calibration, "-o", output, "--overwrite", "--results", write_result(tmp_path, "r.json"))
    assert output.read_bytes() != before


def test_foreign_output_is_kept(tiny_calibration: Path, tmp_path: Path) -> None:
    output = tmp_path / "letter.html"
    output.write_text("<p>Dear all</p>")
    result = run_cli("report", tiny_calibration, "-o", output, "--overwrite")
    assert_error(result, USAGE, "letter.html exists and is not a report, so it is not replaced")
    assert output.read_text() == "<p>Dear all</p>"


def test_missing_source(outputs: Path) -> None:
    result = run_cli("report", outputs / "nowhere", "-o", outputs / "x.html")
    assert_error(result, FAILURE, "nowhere: no such calibration file or artifact", "tda-export calibrate")


def test_folder_that_is_no_artifact(outputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    assert_error(run_cli("report", folder, "-o", outputs / "x.html"), FAILURE, "there is no manifest.json")


def test_file_that_is_no_calibration(outputs: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"no")
    assert_error(
        run_cli("report", path, "-o", outputs / "x.html"), FAILURE, "x.safetensors: not a readable calibration"
    )


def test_missing_folder_of_output(tiny_calibration: Path, tmp_path: Path) -> None:
    result = run_cli("report", tiny_calibration, "-o", tmp_path / "no" / "x.html")
    assert_error(result, USAGE, "does not exist. Create it first.")


def test_bad_results(tiny_calibration: Path, outputs: Path, tmp_path: Path) -> None:
    output = outputs / "x.html"
    missing = run_cli("report", tiny_calibration, "-o", output, "--results", tmp_path / "nowhere.json")
    assert_error(missing, USAGE, "nowhere.json: no such file", "--results")
    bad = write_result(tmp_path, "bad.json", kl="much")
    result = run_cli("report", tiny_calibration, "-o", output, "--results", bad)
    assert_error(result, FAILURE, "bad.json: not a result, 'kl' is missing or not a number", "tda-export eval")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(lines(table_rows()) + "Error: no such file\n")
    result = run_cli("report", tiny_calibration, "-o", output, "--results", rows)
    assert_error(result, FAILURE, "rows.jsonl, line 10: not readable as JSON (Expecting value)")


def test_model_of_few_positions(artifact_copy: Path, outputs: Path) -> None:
    edit_manifest(artifact_copy, lambda manifest: manifest["shape"].update(max_positions=64))
    result = run_cli("report", artifact_copy, "-o", outputs / "x.html")
    assert_error(result, FAILURE, "the model takes 64 tokens", "calibration file instead")


def test_provider_that_cannot_run_it(tiny_artifact: Path, outputs: Path) -> None:
    result = run_cli("report", tiny_artifact, "-o", outputs / "x.html", "--provider", "cuda")
    assert_error(result, USAGE, "this one is float32")


def test_provider_without_an_artifact(tiny_calibration: Path, outputs: Path) -> None:
    result = run_cli("report", tiny_calibration, "-o", outputs / "x.html", "--provider", "cpu")
    assert_error(result, USAGE, "--provider", "no graphs to run")


def test_disk_full(tiny_calibration: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    result = run_cli("report", tiny_calibration, "-o", outputs / "x.html")
    assert_error(result, FAILURE, "x.html: could not be written (No space left on device)")


def test_failure_keeps_the_earlier_report(artifact_copy: Path, tiny_calibration: Path, tmp_path: Path) -> None:
    folder = tmp_path / "reports"
    folder.mkdir()
    run_ok("report", tiny_calibration, "-o", folder / "x.html")
    before = listing(folder)
    (artifact_copy / contract.PREFILL_FILE).write_bytes(bytes((artifact_copy / contract.PREFILL_FILE).stat().st_size))
    result = run_cli("report", artifact_copy, "-o", folder / "x.html", "--overwrite")
    assert_error(result, FAILURE, "ONNX Runtime", "cannot load it")
    assert listing(folder) == before
