"""calibration.safetensors: all curves and their provenance, so that build can choose again without the model."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tda_export.calibration.budgets import Allocation, Budget, allocate
from tda_export.calibration.curves import CurveSums
from tda_export.calibration.kl_table import KlTable
from tda_export.errors import TdaError, UsageError
from tda_export.files import atomic_file

FORMAT = "tda-export calibration"
FORMAT_VERSION = 3  # 3: the KL path; 2: up_square
METADATA_KEY = "tda_export"
KL = "kl_path."  # begins the names of its tensors


@dataclass(frozen=True)
class Calibration:
    """The content of a calibration file. `provenance` is plain data: model, dataset, settings, budget, versions.

    `kl` is the measured KL path, None where only curves were calibrated.
    """

    grid: torch.Tensor  # float32 [K]
    sums: CurveSums
    provenance: dict[str, Any]
    kl: KlTable | None = None

    def allocate(self, budget: Budget, refresh_tokens: int = 0) -> Allocation:
        """Choose the thresholds for a budget (`budgets.allocate`), of which refreshes are a part.

        Raises:
            UsageError: The calibration cannot meet it.
        """
        steps = budget.of_sparse_steps(refresh_tokens)
        try:
            return allocate(steps, self.sums, self.grid, self.kl, ffn_matrices=self.ffn_matrices)
        except UsageError as error:
            if steps is budget:
                raise
            raise UsageError(
                f"{str(budget).capitalize()} with a refresh every {refresh_tokens} tokens leaves {steps.sparsity:.3f} "
                f"to the steps between. {error}"
            ) from error

    @property
    def ffn_matrices(self) -> int:
        """Matrices of the model's FFN."""
        return int(self.provenance["model"]["ffn_matrices"])

    @property
    def model_fingerprint(self) -> str:
        return str(self.provenance["model"]["fingerprint"])


def write_calibration(calibration: Calibration, path: Path) -> None:
    """Write the file whole or not at all. Sums of float64, so that files of data halves still add exactly."""
    tensors = {field.name: getattr(calibration.sums, field.name) for field in fields(CurveSums)}
    if calibration.kl is not None:
        tensors |= {KL + field.name: getattr(calibration.kl, field.name) for field in fields(KlTable)}
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, **calibration.provenance}
    with atomic_file(path) as part:
        try:
            save_file({"grid": calibration.grid, **tensors}, part, metadata={METADATA_KEY: json.dumps(metadata)})
        except SafetensorError as error:  # its way of reporting what the operating system said
            raise OSError(str(error)) from error


def read_calibration(path: Path) -> Calibration:
    """Read and check a calibration file.

    Raises:
        TdaError: It does not exist, is no calibration file, is damaged, or was written by a newer version.
    """
    if not path.is_file():
        raise TdaError(f"{path}: no such calibration file. Make one with 'tda-export calibrate MODEL -o {path}'.")
    try:
        with safe_open(path, framework="pt") as file:
            provenance = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
            if not isinstance(provenance, dict) or provenance.pop("format", None) != FORMAT:
                raise TdaError(f"{path}: not a calibration. Give a file from 'tda-export calibrate'.")
            version = provenance.pop("format_version")
            if version > FORMAT_VERSION:
                raise TdaError(
                    f"{path}: calibration format {version} is newer than this tda-export ({FORMAT_VERSION}). Update it."
                )
            if version < FORMAT_VERSION:
                raise TdaError(
                    f"{path}: calibration format {version} is older than this tda-export's ({FORMAT_VERSION}). "
                    "Run 'tda-export calibrate' again."
                )
            _ = provenance["model"]["name"], provenance["model"]["fingerprint"]
            _check_budget(provenance["budget"])
            sums = CurveSums(*(file.get_tensor(field.name) for field in fields(CurveSums)))
            names = {KL + field.name for field in fields(KlTable)}
            table = None
            if names & set(file.keys()):
                table = KlTable(*(file.get_tensor(KL + field.name) for field in fields(KlTable)))
            return Calibration(file.get_tensor("grid"), sums, provenance, table)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise TdaError(f"{path}: not a readable calibration ({error}). Run 'tda-export calibrate' again.") from error


def _check_budget(budget: dict[str, Any]) -> None:
    try:
        Budget(**budget)
    except UsageError as error:  # whoever gives the file did not choose the budget in it
        raise ValueError(str(error)) from error


def allocation_from(path: Path, budget: Budget) -> Allocation:
    """Choose thresholds for a budget from a calibration file; an artifact carries its own.

    Raises:
        TdaError: The file cannot be read.
        UsageError: The budget asks for more than the calibration holds.
    """
    return read_calibration(path).allocate(budget)


def is_calibration(path: Path) -> bool:
    """Tell whether a file is a calibration, of any version."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})[METADATA_KEY])["format"] == FORMAT
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return False
