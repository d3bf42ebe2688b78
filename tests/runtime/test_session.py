"""Sessions refuse graphs that reach outside the artifact."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest

from tda_export.errors import TdaError
from tda_export.graph import contract
from tda_export.runtime.artifact import open_artifact
from tda_export.runtime.session import open_session


@pytest.mark.parametrize("location", ["../weights.bin", "link.bin"])
def test_weights_outside_the_folder_are_never_read(tiny_artifact: Path, tmp_path: Path, location: str) -> None:
    folder = Path(shutil.copytree(tiny_artifact, tmp_path / "artifact"))
    shutil.copy(folder / contract.WEIGHTS_FILE, tmp_path / contract.WEIGHTS_FILE)
    (folder / "link.bin").symlink_to(tmp_path / contract.WEIGHTS_FILE)
    model = onnx.load(folder / contract.DECODE_FILE, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (folder / contract.DECODE_FILE).write_bytes(model.SerializeToString())
    with pytest.raises(TdaError, match=r"decode\.onnx: ONNX Runtime .* cannot load it .*escapes model directory"):
        open_session(open_artifact_unchecked(folder), contract.DECODE_FILE, "cpu", {})


def open_artifact_unchecked(folder: Path):  # type: ignore[no-untyped-def]
    """Open a folder whose decode graph was changed to another size."""
    import json

    path = folder / contract.MANIFEST_FILE
    manifest = json.loads(path.read_text())
    manifest["files"][contract.DECODE_FILE]["size"] = (folder / contract.DECODE_FILE).stat().st_size
    path.write_text(json.dumps(manifest))
    return open_artifact(folder)
