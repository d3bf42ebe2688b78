"""What an interrupted calibration resumes from: its sums and the state of its sweep, in a file next to the output."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tda_export.calibration.curves import CurveSums
from tda_export.calibration.kl_path import PathState
from tda_export.calibration.kl_run import Sweep
from tda_export.calibration.kl_table import COLUMNS
from tda_export.calibration.marginals import Densities, EstimateHistogram
from tda_export.calibration.price_file import Priced, describe_priced, priced_from, priced_tensors
from tda_export.errors import TdaError
from tda_export.files import as_os_error, atomic_file, remove_leftovers

SUFFIX = ".partial"
KEY = "tda_export_partial"
PRICED = "priced."  # prefix of the names of prices
UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError)
MEASURED = "measured."  # prefix of the names of the columns of measured rows


class PartialFile:
    """The file of one calibration. It is reused only for the same model, data, settings and version (`key`)."""

    def __init__(self, output: Path, key: dict[str, Any]) -> None:
        """Name the file next to `output`.

        Args:
            output: The calibration file that will be written.
            key: Plain data that identifies what is calibrated.
        """
        self.path = output.with_name(output.name + SUFFIX)
        self._key = json.dumps(key, sort_keys=True)
        self._parts: dict[str, dict[str, torch.Tensor]] = {}  # of masks (no prefix) and of prices, as last saved

    def save(self, sums: CurveSums, sweep: Sweep | None = None) -> None:
        """Write the sums so far, atomically. `sums.sequences` tells how many sequences are in them.

        Raises:
            TdaError: The operating system refused to write.
        """
        tensors = {field.name: getattr(sums, field.name) for field in fields(CurveSums)}
        if sweep is not None:
            tensors |= _state_tensors(sweep.state)
            columns = zip(COLUMNS, zip(*sweep.rows, strict=True), strict=False)  # no columns without rows
            tensors |= {MEASURED + name: torch.stack(values) for name, values in columns}
        self._write("", tensors)

    def save_priced(self, priced: Priced) -> None:
        """Write the prices so far, atomically, together with the sums of prompt masks.

        Raises:
            TdaError: The operating system refused to write.
        """
        self._write(PRICED, {PRICED + name: tensor for name, tensor in priced_tensors(priced).items()})

    def _write(self, kind: str, new: dict[str, torch.Tensor]) -> None:
        self._parts[kind] = {name: tensor.detach().cpu().contiguous() for name, tensor in new.items()}
        tensors = {name: tensor for part in self._parts.values() for name, tensor in part.items()}
        try:
            with atomic_file(self.path) as part:
                try:
                    save_file(tensors, part, metadata={KEY: self._key})
                except SafetensorError as error:
                    raise as_os_error(error) from error
        except TdaError as error:
            goes_on = f" Start it again to resume from {self.path}." if self.path.exists() else ""
            raise TdaError(f"{error} The calibration has stopped.{goes_on}") from error

    def load(self) -> tuple[CurveSums, Sweep | None] | None:
        """Read the state of prompt masks that an earlier run of the same calibration left; None where there is none."""
        try:
            tensors = {name: value for name, value in self._read().items() if not name.startswith(PRICED)}
            sums = CurveSums(*(tensors[field.name] for field in fields(CurveSums)))
            found = sums, _sweep(tensors) if "path.step" in tensors else None
        except UNREADABLE:
            return None  # missing, damaged or of another kind: start over
        self._parts[""] = tensors
        return found

    def load_priced(self, begun: Priced) -> Priced | None:
        """Read the prices that an earlier run of the same calibration left; None where there are none.

        None as well where a development version measured fewer sequences after short prompts.

        Args:
            begun: Empty prices of the same model, before any work.
        """
        try:
            tensors = {name: value for name, value in self._read().items() if name.startswith(PRICED)}
            named = {name.removeprefix(PRICED): value for name, value in tensors.items()}
            priced = priced_from(describe_priced(begun), named)
        except UNREADABLE:
            return None
        if not all(table.measured_short(begun.prompts is not None) for table in priced.measured.values()):
            return None
        self._parts[PRICED] = tensors
        return priced

    def _read(self) -> dict[str, torch.Tensor]:
        with safe_open(self.path, framework="pt") as file:
            if (file.metadata() or {}).get(KEY) != self._key:
                return {}
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping

    def remove(self) -> None:
        """Delete the file, if there is one, and leftovers of killed runs."""
        self.path.unlink(missing_ok=True)
        remove_leftovers(self.path)


def _state_tensors(state: PathState) -> dict[str, torch.Tensor]:
    return {
        "path.step": torch.tensor([state.step]),
        "path.mask": state.densities.mask,
        "path.token": state.densities.token,
        "path.token_thresholds": state.token_thresholds,
        "path.prices": state.prices,
        "path.counts": state.histogram.counts,
        "path.total": state.histogram.total,
        "path.mask_densities": torch.stack(state.mask_densities),
        "path.token_densities": torch.stack(state.token_densities),
    }


def _sweep(tensors: dict[str, torch.Tensor]) -> Sweep:
    if MEASURED + COLUMNS[0] not in tensors:
        return Sweep(_state(tensors))
    columns = [tensors[MEASURED + name] for name in COLUMNS]
    return Sweep(_state(tensors), list(zip(*columns, strict=True)))


def _state(tensors: dict[str, torch.Tensor]) -> PathState:
    counts = tensors["path.counts"]
    histogram = EstimateHistogram(len(counts), counts.device)
    histogram.counts, histogram.total = counts, tensors["path.total"]
    return PathState(
        int(tensors["path.step"]),
        Densities(tensors["path.mask"], tensors["path.token"]),
        tensors["path.token_thresholds"],
        histogram,
        tensors["path.prices"],
        list(tensors["path.mask_densities"]),
        list(tensors["path.token_densities"]),
    )
