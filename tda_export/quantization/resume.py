"""Finished layers: one file each next to the output, from which an interrupted quantisation resumes. The losses that
formats are chosen by have one more file there.

They are read again for the output, so memory holds the packed codes of two layers at most.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tda_export.errors import TdaError, UsageError, first_line
from tda_export.files import as_os_error, atomic_file, remove_leftovers
from tda_export.weights.formats import IntegerFormat
from tda_export.weights.integers import Codes, CodesByName, PackedCodes

SUFFIX = ".partial"
KEY = "tda_export_partial"
LOSSES = "losses.safetensors"
KEPT = re.compile(rf"layer-\d{{5}}\.safetensors|{re.escape(LOSSES)}")
UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError)

Shapes = Mapping[str, tuple[IntegerFormat, tuple[int, int]]]  # format, rows and columns of integer matrices by name


class PartialLayers:
    """The folder of finished layers. They are reused only for the same model, data, settings and versions."""

    def __init__(self, output: Path, key: dict[str, Any]) -> None:
        """Name the folder next to `output`.

        Args:
            output: The folder that the quantisation will write.
            key: Plain data that identifies what is quantised and how.
        """
        self.folder = output.with_name(output.name + SUFFIX)
        self._key = json.dumps(key, sort_keys=True)

    def check(self) -> None:
        """Refuse a folder that cannot be written, or that holds foreign files, before any long work.

        Raises:
            UsageError: The folder cannot be written, or holds foreign files.
        """
        if not os.path.lexists(self.folder):
            return
        usable = self.folder.is_dir() and os.access(self.folder, os.W_OK)
        if not usable or any(path.is_dir() or _key(path) is None for path in self._kept()):
            raise UsageError(
                f"{self.folder} exists, and finished layers are stored there until all are done. Move it away, or "
                "choose another output."
            )

    def save(self, layer: int, codes: Mapping[str, PackedCodes]) -> None:
        """Write the matrices of a layer atomically.

        Raises:
            TdaError: The operating system refused to write.
        """
        tensors: dict[str, np.ndarray] = {}
        for name, found in codes.items():
            stored = zip(found.format.tensors(name, found.rows, found.columns), found.tensors, strict=True)
            tensors |= {tensor.name: array for tensor, array in stored}
        self._write(self._path(layer), tensors, goes_on=layer > 0)

    def save_losses(self, losses: dict[str, float]) -> None:
        """Write what linears lose, by name, atomically.

        Raises:
            TdaError: The operating system refused to write.
        """
        self._write(self.folder / LOSSES, {name: np.array([loss]) for name, loss in losses.items()}, goes_on=False)

    def load_losses(self, names: list[str]) -> dict[str, float] | None:
        """Read the losses that an earlier run of the same quantisation saved; None where they are not there."""
        path = self.folder / LOSSES
        try:
            if _key(path) != self._key:
                return None
            with safe_open(path, framework="numpy") as file:
                return {name: float(file.get_tensor(name)[0]) for name in names}
        except UNREADABLE:
            return None

    def _write(self, path: Path, tensors: dict[str, np.ndarray], *, goes_on: bool) -> None:
        try:
            self.folder.mkdir(exist_ok=True)
            with atomic_file(path) as part:
                try:
                    save_file(tensors, part, metadata={KEY: self._key})
                except SafetensorError as error:
                    raise as_os_error(error) from error
        except (TdaError, OSError) as error:
            resume = f" Start it again to resume after the layers in {self.folder}." if goes_on else ""
            text = str(error) if isinstance(error, TdaError) else f"{path}: {error.strerror or error}."
            raise TdaError(f"{text} The quantisation has stopped.{resume}") from error

    def load(self, layer: int, shapes: Shapes) -> dict[str, Codes] | None:
        """Read a layer that an earlier run of the same quantisation finished; None where there is none.

        Args:
            layer: The layer's number.
            shapes: The shapes of its integer matrices.
        """
        try:
            if _key(self._path(layer)) != self._key:
                return None
            return {name: self._codes(layer, name, *shape) for name, shape in shapes.items()}
        except UNREADABLE:
            return None  # missing or damaged: quantise it again

    def read(self, layer: int, name: str, format: IntegerFormat, shape: tuple[int, int]) -> Codes:
        """Read a matrix of a finished layer.

        Raises:
            TdaError: The file is no longer there.
        """
        try:
            return self._codes(layer, name, format, shape)
        except UNREADABLE as error:
            raise TdaError(
                f"{self._path(layer)}: it was written, and can no longer be read ({first_line(error)}). Start again; "
                "the other layers are kept."
            ) from error

    def remove(self) -> None:
        """Delete layers of any quantisation, leftovers of killed runs, and the folder unless it holds other files."""
        if not self.folder.is_dir():
            return
        for path in self._kept():
            remove_leftovers(path)
            if _key(path):
                path.unlink()
        for path in (self._path(0), self.folder / LOSSES):
            remove_leftovers(path)
        try:
            self.folder.rmdir()
        except OSError:
            return  # the folder holds foreign files

    def _codes(self, layer: int, name: str, format: IntegerFormat, shape: tuple[int, int]) -> Codes:
        with safe_open(self._path(layer), framework="numpy") as file:
            stored = [file.get_tensor(tensor.name) for tensor in format.tensors(name, *shape)]
        return Codes.unpack(format, shape[1], *stored)

    def _path(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05}.safetensors"

    def _kept(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if KEPT.fullmatch(path.name)]


class LayerSaver:
    """Saves layers in a thread of its own, while the next is quantised.

    Leaving its context waits for the last. Its error is raised also where the block has raised another.
    """

    def __init__(self, layers: PartialLayers) -> None:
        self.layers, self._thread = layers, ThreadPoolExecutor(1, "save")
        self._last: Future[None] | None = None

    def __enter__(self) -> LayerSaver:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()
        self._wait()

    def save(self, layer: int, codes: Mapping[str, PackedCodes]) -> None:
        """Begin to save a layer, once the one before is saved.

        Raises:
            TdaError: The operating system refused to write the one before.
        """
        self._wait()
        self._last = self._thread.submit(self.layers.save, layer, codes)

    def _wait(self) -> None:
        if self._last is not None:
            last, self._last = self._last, None
            last.result()


class KeptCodes(CodesByName):
    """Integer matrices as they are finished: packed in memory, or in files."""

    def __init__(self) -> None:
        super().__init__({})

    def keep(self, codes: Mapping[str, PackedCodes]) -> None:
        """Keep matrices in memory."""
        self._read |= {name: found.unpack for name, found in codes.items()}

    def keep_saved(self, layers: PartialLayers, layer: int, shapes: Shapes) -> None:
        """Keep the matrices of a layer in the file where it was saved."""
        for name, shape in shapes.items():
            self._read[name] = partial(layers.read, layer, name, *shape)


def _key(path: Path) -> str | None:
    """Return the key that a layer was saved for: None for other files, "" for a damaged one."""
    try:
        with safe_open(path, framework="numpy") as file:
            key: str | None = (file.metadata() or {}).get(KEY)
            return key
    except UNREADABLE:
        return ""
