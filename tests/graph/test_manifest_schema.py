"""The manifest's JSON schema accepts manifests of build, and refuses the damaged ones that opening refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tda_export.errors import TdaError
from tda_export.graph import contract
from tda_export.runtime.artifact import NEEDED_FILES, open_artifact
from tests.conftest import run_ok
from tests.runtime.conftest import edit_manifest

PATH = Path(contract.__file__).with_name("manifest.schema.json")
SCHEMA = json.loads(PATH.read_text(encoding="utf-8"))
OPTIONAL = {"kv"}  # missing in artifacts of earlier versions
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / contract.MANIFEST_FILE).read_text(encoding="utf-8"))


def test_schema_is_one_and_is_of_this_format() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    properties = SCHEMA["properties"]
    assert properties["format"]["const"] == contract.FORMAT
    assert properties["format_version"]["const"] == contract.FORMAT_VERSION
    assert set(properties["files"]["required"]) == set(NEEDED_FILES)
    assert set(SCHEMA["$defs"]["tensor"]["properties"]["dtype"]["enum"]) == set(contract.DTYPE_BYTES) - {"uint8"}
    assert set(SCHEMA["$defs"]["model_dtype"]["enum"]) == set(contract.DTYPES.values())


@pytest.mark.parametrize(
    "options",
    [
        ("--sparsity", "0.5", "--refresh", "16"),
        ("--max-kl", "0.05"),
        ("--cett", "0.2", "--tail", "mean"),
        ("--sparsity", "0.3", "--allocation", "uniform", "--dtype", "fp16"),
        ("--method", "griffin", "--sparsity", "0.5"),
    ],
    ids=" ".join,
)
def test_every_method_and_budget(
    options: tuple[str, ...], tiny_model: Path, tiny_calibration: Path, tmp_path: Path
) -> None:
    calibration = () if "griffin" in options else ("--method", "tda", "--calibration", tiny_calibration)
    run_ok("build", tiny_model, *calibration, *options, "--no-verify", "-o", tmp_path / "artifact")
    manifest = manifest_of(tmp_path / "artifact")
    VALIDATOR.validate(manifest)
    assert set(manifest) == properties_of("indexed")


def properties_of(layout: str) -> set[str]:
    """Return the properties that the schema requires for a layout."""
    by_layout = {part["if"]["properties"]["layout"]["const"]: part["then"]["required"] for part in SCHEMA["allOf"]}
    assert set(by_layout) == set(SCHEMA["properties"]["layout"]["enum"])
    assert {*SCHEMA["required"], *OPTIONAL}.union(*by_layout.values()) == set(SCHEMA["properties"])
    return {*SCHEMA["required"], *OPTIONAL, *by_layout[layout]}


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--max-kl", "0.05"),
        ("--price", "0"),
        ("--sparsity", "0.3", "--packing", "sites"),
        ("--sparsity", "0.3", "--dtype", "fp16"),
        ("--price", "0", "--weights", "int4", "--weights-for", "head=int8_g64"),
        ("--price", "0", "--kv", "int8"),
    ],
    ids=" ".join,
)
def test_every_budget_of_prices(
    options: tuple[str, ...], tiny_model: Path, priced_calibration: Path, tmp_path: Path
) -> None:
    arguments = ("--calibration", priced_calibration, *options, "--no-verify", "-o", tmp_path / "artifact")
    run_ok("build", tiny_model, *arguments)
    manifest = manifest_of(tmp_path / "artifact")
    VALIDATOR.validate(manifest)
    assert set(manifest) == properties_of("priced")
    VALIDATOR.validate(manifest | {"price_table": None})


def first_row(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["price_table"]["rows"][0]


PRICED_DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "unknown layout": lambda manifest: manifest.update(layout="blocked"),
    "layout of masks": lambda manifest: manifest.update(layout="indexed"),
    "method of masks": lambda manifest: manifest.update(method={"name": "tda"}),
    "more of a method": lambda manifest: manifest["method"].update(statistic="magnitude"),
    "no price": lambda manifest: manifest.pop("price"),
    "unknown keys and values": lambda manifest: manifest.update(kv="int4"),
    "negative price": lambda manifest: manifest.update(price=-1.0),
    "price of text": lambda manifest: manifest.update(price="0"),
    "no table": lambda manifest: manifest.pop("price_table"),
    "unknown packing": lambda manifest: manifest.update(packing="blocks"),
    "unknown packing without a table": lambda manifest: manifest.update(packing="blocks", price_table=None),
    "table of one row": lambda manifest: manifest["price_table"].update(rows=manifest["price_table"]["rows"][:1]),
    "table of no size": lambda manifest: manifest["price_table"].update(element_bytes=0),
    "row without a KL": lambda manifest: first_row(manifest).pop("kl"),
    "share above one": lambda manifest: first_row(manifest).update(share=1.5),
    "negative KL": lambda manifest: first_row(manifest).update(kl=-0.1),
    "rows of outputs": lambda manifest: manifest["matrices"][contract.linear_weight(0, "q")].update(major="output"),
}


@pytest.mark.parametrize("name", PRICED_DAMAGES)
def test_damage_of_prices_is_refused_by_schema_and_driver(name: str, priced_artifact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(priced_artifact, tmp_path / "artifact"))
    edit_manifest(folder, PRICED_DAMAGES[name])
    assert not VALIDATOR.is_valid(manifest_of(folder))
    with pytest.raises(TdaError, match="incomplete manifest"):
        open_artifact(folder)


DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "foreign": lambda manifest: manifest.update(format="gguf"),
    "newer": lambda manifest: manifest.update(format_version=contract.FORMAT_VERSION + 1),
    "no shape": lambda manifest: manifest.pop("shape"),
    "no layers": lambda manifest: manifest["shape"].update(num_layers=0),
    "unknown size": lambda manifest: manifest["shape"].update(colour=1),
    "unknown dtype": lambda manifest: manifest["shape"].update(dtype="int4"),
    "no name": lambda manifest: manifest["model"].pop("name"),
    "stop tokens of text": lambda manifest: manifest["model"].update(eos_token_ids=["</s>"]),
    "unknown statistic": lambda manifest: manifest["method"].update(statistic="luck"),
    "top-k without a density": lambda manifest: manifest["method"].update(selection="topk"),
    "thresholds of text": lambda manifest: manifest.update(thresholds=["a", "b", "c"]),
    "refresh of one token": lambda manifest: manifest["refresh"].update(tokens=1),
    "decay above one": lambda manifest: manifest["refresh"].update(decay=1.5),
    "file outside": lambda manifest: manifest["files"].update({"../x": {"size": 1, "sha256": "0" * 64}}),
    "parent folder": lambda manifest: manifest["files"].update({"..": {"size": 1, "sha256": "0" * 64}}),
    "no weights file": lambda manifest: manifest["files"].pop(contract.WEIGHTS_FILE),
    "no hash": lambda manifest: manifest["files"][contract.WEIGHTS_FILE].pop("sha256"),
    "negative offset": lambda manifest: manifest["weights"][contract.EMBEDDING].update(offset=-4096),
    "no embedding": lambda manifest: manifest["weights"].pop(contract.EMBEDDING),
    "no graph weights": lambda manifest: manifest["graph_weights"].pop(contract.DECODE_FILE),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_by_schema_and_driver(name: str, artifact_copy: Path) -> None:
    edit_manifest(artifact_copy, DAMAGES[name])
    assert not VALIDATOR.is_valid(manifest_of(artifact_copy))
    with pytest.raises(TdaError):
        open_artifact(artifact_copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.pop("io"),
        lambda manifest: manifest["io"][contract.PREFILL_FILE]["inputs"][0].pop("axes"),
        lambda manifest: manifest.update(budget={"cett": 0.2, "max_kl": 0.1}),
        lambda manifest: manifest["files"][contract.WEIGHTS_FILE].update(sha256="abc"),
        lambda manifest: manifest["weights"][contract.EMBEDDING].update(offset=5),
    ],
    ids=["no io", "no axes", "two budgets", "short hash", "unaligned"],
)
def test_schema_refuses_what_our_driver_does_not_read(
    change: Callable[[dict[str, Any]], object], artifact_copy: Path
) -> None:
    edit_manifest(artifact_copy, change)
    assert not VALIDATOR.is_valid(manifest_of(artifact_copy))


def test_unknown_properties_are_for_later_versions(artifact_copy: Path) -> None:
    edit_manifest(artifact_copy, lambda manifest: manifest.update(later=1))
    VALIDATOR.validate(manifest_of(artifact_copy))
    open_artifact(artifact_copy)
