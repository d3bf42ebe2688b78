"""The tiny artifacts of both layouts, and the model that they were built from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tda_export.packing import PACKINGS
from tests.conftest import TINY_LENGTHS, run_ok
from tests.runtime.conftest import model, priced_model, reference, source

__all__ = ["model", "priced_folders", "priced_model", "reference", "source", "tables_calibration"]


@pytest.fixture(scope="session")
def tables_calibration(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration of the tiny model with prices and their tables. It does not have the name of the one that
    `priced_artifact` is built from: a fixture of the session takes what it depends on from whoever asks first."""
    path = tmp_path_factory.mktemp("priced") / "c.safetensors"
    run_ok("calibrate", tiny_model, "-o", path, "--sparsity", "0.4", *TINY_LENGTHS)
    return path


@pytest.fixture(scope="session")
def priced_folders(tiny_model: Path, tables_calibration: Path) -> dict[str, Path]:
    """The tiny model's priced artifacts, one for each packing."""
    folders = {packing: tables_calibration.parent / packing for packing in PACKINGS}
    for packing, folder in folders.items():
        given = ("--calibration", tables_calibration, "--packing", packing)
        run_ok("build", tiny_model, *given, "--no-verify", "-o", folder)
    return folders
