"""The manifest's JSON schema: it takes what build writes and refuses what is damaged, as opening does."""

from __future__ import annotations

import json
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
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / contract.MANIFEST_FILE).read_text(encoding="utf-8"))


def test_schema_is_one_and_is_of_this_format() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    properties = SCHEMA["properties"]
    assert properties["format"]["const"] == contract.FORMAT
    assert properties["format_version"]["const"] == contract.FORMAT_VERSION
    assert set(properties["files"]["required"]) == set(NEEDED_FILES)
    assert set(SCHEMA["$defs"]["tensor"]["properties"]["dtype"]["enum"]) == set(contract.DTYPE_BYTES)
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
    assert set(manifest) == set(SCHEMA["properties"])


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
