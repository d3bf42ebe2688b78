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
from tda_export.calibration.price_file import Priced, describe_priced, finished, priced_from, priced_tensors
from tda_export.errors import TdaError, UsageError
from tda_export.ffn_share import GATED
from tda_export.files import as_os_error, atomic_file

FORMAT = "tda-export calibration"
FORMAT_VERSION = 4  # 4: prices of rows; 3: the KL path; 2: up_square
OLDEST_VERSION = 3  # that is still read
METADATA_KEY = "tda_export"
PRICED = "priced"  # in the metadata: what of the prices is no tensor
KL = "kl_path."  # begins the names of its tensors


@dataclass(frozen=True)
class Calibration:
    """The content of a calibration file. `provenance` is plain data: model, dataset, settings, budget, versions.

    `curves` are None where prices alone were calibrated. `kl` is the measured KL path, None where it was not looked
    for. `priced` are the prices of rows, None where masks alone were calibrated.
    """

    grid: torch.Tensor  # float32 [K]
    curves: CurveSums | None
    provenance: dict[str, Any]
    kl: KlTable | None = None
    priced: Priced | None = None

    @property
    def sums(self) -> CurveSums:
        """The curves.

        Raises:
            UsageError: There are none.
        """
        if self.curves is None:
            raise UsageError(
                "This calibration holds prices of rows, which masks of neurons cannot be chosen from. Calibrate with "
                "--method tda, or all."
            )
        return self.curves

    def allocate(self, budget: Budget, refresh_tokens: int = 0) -> Allocation:
        """Choose the thresholds for a budget (`budgets.allocate`), of which refreshes are a part.

        Raises:
            UsageError: The calibration cannot meet it.
        """
        steps = budget.of_sparse_steps(refresh_tokens)
        try:
            return allocate(steps, self.sums, self.grid, self.kl, self.ffn_matrices)
        except UsageError as error:
            if steps is budget:
                raise
            raise UsageError(
                f"{str(budget).capitalize()} with a refresh every {refresh_tokens} tokens leaves {steps.sparsity:.3f} "
                f"to the steps between. {error}"
            ) from error

    @property
    def ffn_matrices(self) -> int:
        """Matrices of the model's FFN. Files of earlier versions are of FFNs with gates."""
        return int(self.provenance["model"].get("ffn_matrices", GATED))

    @property
    def model_fingerprint(self) -> str:
        return str(self.provenance["model"]["fingerprint"])


def write_calibration(calibration: Calibration, path: Path) -> None:
    """Write the file whole or not at all. Sums of float64, so that files of data halves still add exactly."""
    tensors = {}
    if calibration.curves is not None:
        tensors = {field.name: getattr(calibration.curves, field.name) for field in fields(CurveSums)}
    if calibration.kl is not None:
        tensors |= {KL + field.name: getattr(calibration.kl, field.name) for field in fields(KlTable)}
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, **calibration.provenance}
    if calibration.priced is not None:
        tensors |= priced_tensors(calibration.priced)
        metadata[PRICED] = describe_priced(calibration.priced)
    with atomic_file(path) as part:
        try:
            save_file({"grid": calibration.grid, **tensors}, part, metadata={METADATA_KEY: json.dumps(metadata)})
        except SafetensorError as error:
            raise as_os_error(error) from error


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
            if version < OLDEST_VERSION:
                raise TdaError(
                    f"{path}: calibration format {version} is older than this tda-export's ({FORMAT_VERSION}). "
                    "Run 'tda-export calibrate' again."
                )
            _ = provenance["model"]["name"], provenance["model"]["fingerprint"]
            _check_budget(provenance["budget"])
            content = provenance.pop(PRICED, None)
            priced = None
            if content is not None:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                priced = finished(priced_from(content, tensors))
            sums = None
            if priced is None or fields(CurveSums)[0].name in file.keys():  # noqa: SIM118 - no mapping
                sums = CurveSums(*(file.get_tensor(field.name) for field in fields(CurveSums)))
            names = {KL + field.name for field in fields(KlTable)}
            table = None
            if names & set(file.keys()):
                table = KlTable(*(file.get_tensor(KL + field.name) for field in fields(KlTable)))
            return Calibration(file.get_tensor("grid"), sums, provenance, table, priced)
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
