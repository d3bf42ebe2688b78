"""calibration.safetensors: all curves and their provenance, so that build can choose again without the model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tda_export.calibration.budgets import Allocation, Budget, allocate
from tda_export.calibration.checks import LARGEST, check_curves, check_path
from tda_export.calibration.curves import CurveSums
from tda_export.calibration.kl_table import KlTable
from tda_export.calibration.price_file import Priced, describe_priced, finished, priced_from, priced_tensors
from tda_export.errors import TdaError, UsageError, first_line, shown
from tda_export.ffn_share import FFN_MATRICES
from tda_export.files import as_os_error, atomic_file

FORMAT = "tda-export calibration"
FORMAT_VERSION = 5  # 5: factors of prices; 4: prices of rows; 3: the KL path; 2: up_square
OLDEST_VERSION = 3  # the oldest version that is still read
METADATA_KEY = "tda_export"
PRICED = "priced"  # metadata key of the prices' plain data
DIGEST_KEY = "sha256"  # metadata key of the hash over the provenance and all tensors
KL = "kl_path."  # prefix of the KL path's tensor names
SUMS, PATH = fields(CurveSums), fields(KlTable)


@dataclass(frozen=True)
class Calibration:
    """The content of a calibration file. `provenance` is plain data: model, dataset, settings, budget, versions.

    `curves` is None where only prices were calibrated. `kl` is the measured KL path, None where none was searched.
    `priced` holds the prices of rows, None where only prompt masks were calibrated.
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
            UsageError: The calibration has no curves.
        """
        if self.curves is None:
            raise UsageError(
                "This calibration contains prices only, and masks cannot be chosen from them. Calibrate with "
                "--method tda, or all."
            )
        return self.curves

    def allocate(self, budget: Budget, refresh_tokens: int = 0) -> Allocation:
        """Choose the thresholds for a budget (`budgets.allocate`) that includes refreshes.

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
        """The number of matrices of the model's FFN."""
        return int(self.provenance["model"]["ffn_matrices"])

    @property
    def model_fingerprint(self) -> str:
        return str(self.provenance["model"]["fingerprint"])


def write_calibration(calibration: Calibration, path: Path) -> None:
    """Write the file atomically. Sums stay float64, so that files of two halves of the data still add exactly.

    Raises:
        TdaError: The calibration holds invalid values, or the file cannot be written.
    """
    tensors = {"grid": calibration.grid}
    if calibration.curves is not None:
        tensors |= {field.name: getattr(calibration.curves, field.name) for field in SUMS}
    if calibration.kl is not None:
        tensors |= {KL + field.name: getattr(calibration.kl, field.name) for field in PATH}
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, **calibration.provenance}
    if calibration.priced is not None:
        tensors |= priced_tensors(calibration.priced)
        content[PRICED] = describe_priced(calibration.priced)
    try:
        _check(calibration)
    except ValueError as error:
        raise TdaError(f"{path}: not written, because the calibration failed ({error}). Use --dtype fp32.") from error
    # Only one entry: safetensors writes several in any order, but equal calibrations must give equal files.
    metadata = {METADATA_KEY: json.dumps(content | {DIGEST_KEY: _digest(content, tensors)})}
    with atomic_file(path) as part:
        try:
            save_file(tensors, part, metadata=metadata)
        except SafetensorError as error:
            raise as_os_error(error) from error


def read_calibration(path: Path) -> Calibration:
    """Read and check a calibration file.

    Raises:
        TdaError: The file does not exist, is not a calibration, is damaged, was written by a newer version, or holds
            invalid tensors: of the wrong shape, not finite, negative, out of order. The message names the tensor.
    """
    if not path.is_file():
        raise TdaError(f"{path}: no such calibration file. Make one with 'tda-export calibrate MODEL -o {path}'.")
    try:
        with safe_open(path, framework="pt") as file:
            provenance = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
            digest = provenance.pop(DIGEST_KEY, None) if isinstance(provenance, dict) else None
            content = provenance.copy() if isinstance(provenance, dict) else {}
            _check_format(path, provenance)
            _check_provenance(provenance)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        described, priced, sums, table = provenance.pop(PRICED, None), None, None, None
        if described is not None:
            priced = finished(priced_from(described, tensors))
        if priced is None or SUMS[0].name in tensors:
            sums = CurveSums(*(tensors[field.name] for field in SUMS))
        if any(name.startswith(KL) for name in tensors):
            table = KlTable(*(tensors[KL + field.name] for field in PATH))
        calibration = Calibration(tensors["grid"], sums, provenance, table, priced)
        _check(calibration)
        # Older files have no hash.
        if digest is not None and digest != _digest(content, tensors):
            raise ValueError("its content is not what was written")
        return calibration
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        raise TdaError(
            f"{path}: not a readable calibration ({first_line(error)}). Run 'tda-export calibrate' again."
        ) from error


def _check_format(path: Path, provenance: Any) -> None:
    """Remove format and version from a provenance, and check that this version can read it."""
    if not isinstance(provenance, dict) or provenance.pop("format", None) != FORMAT:
        raise TdaError(f"{path}: not a calibration. Give a file from 'tda-export calibrate'.")
    version = provenance.pop("format_version")
    if type(version) is not int:
        raise TypeError("no format version")
    if version > FORMAT_VERSION:
        raise TdaError(
            f"{path}: calibration format {shown(version)} is newer than this tda-export ({FORMAT_VERSION}). Update it."
        )
    if version < OLDEST_VERSION:
        raise TdaError(
            f"{path}: calibration format {shown(version)} is older than this tda-export's ({FORMAT_VERSION}). "
            "Run 'tda-export calibrate' again."
        )


def _check_provenance(provenance: dict[str, Any]) -> None:
    model, budget = provenance["model"], provenance["budget"]
    for key in ("name", "fingerprint"):
        if not isinstance(model[key], str):
            raise TypeError(f"model.{key} is not text")
    if type(model["ffn_matrices"]) is not int or model["ffn_matrices"] not in FFN_MATRICES:
        raise ValueError(f"model.ffn_matrices is {shown(model['ffn_matrices'])}")
    check_budget(budget)


def check_budget(budget: dict[str, Any]) -> None:
    """Check a budget from a file, whose numbers the user did not choose.

    Raises:
        ValueError: It is not a budget.
        TypeError: A value is of the wrong type.
    """
    if not isinstance(budget, dict):
        raise TypeError("budget is not a record")
    for name, value in budget.items():
        if name != "allocation" and (isinstance(value, bool) or not isinstance(value, int | float | None)):
            raise TypeError(f"budget.{shown(name)} is not a number")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError(f"budget.{shown(name)} is {shown(value)}")
    try:
        Budget(**budget)
    except UsageError as error:
        raise ValueError(str(error)) from error


def _check(calibration: Calibration) -> None:
    if calibration.curves is None:
        return
    sizes = check_curves(calibration.grid, calibration.curves)
    if calibration.kl is not None:
        try:
            check_path(calibration.kl, sizes.layers)
        except ValueError as error:
            raise ValueError(f"{KL}{error}") from error


def _digest(content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """Hash provenance and tensors, so that a flipped bit is detected."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def allocation_from(path: Path, budget: Budget) -> Allocation:
    """Choose thresholds for a budget from a calibration file; an artifact carries its own.

    Raises:
        TdaError: The file cannot be read.
        UsageError: The budget asks for more than the calibration holds.
    """
    return read_calibration(path).allocate(budget)


def is_calibration(path: Path) -> bool:
    """Return whether a file is a calibration of any version."""
    try:
        with safe_open(path, framework="pt") as file:
            return bool(json.loads((file.metadata() or {})[METADATA_KEY])["format"] == FORMAT)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
