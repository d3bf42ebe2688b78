"""Open an artifact folder: read its manifest, and refuse a folder that is damaged, foreign or unsafe."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from tda_export.errors import TdaError, UsageError, first_line, shown
from tda_export.graph import contract, kv_formats
from tda_export.graph.contract import ModelShape
from tda_export.pricing import PriceTable
from tda_export.runtime.deployment import AnyDeployment, Deployment, Refresh, price_deployment
from tda_export.runtime.manifest import check_manifest
from tda_export.weights.matrix import Matrix

NEEDED_FILES = (
    contract.PREFILL_FILE,
    contract.DECODE_FILE,
    contract.WEIGHTS_FILE,
    contract.TOKENIZER_FILE,
)
LONGEST_NAME = 255  # bytes of a file's name, on most systems
HUB_REPOSITORY, HUB_SNAPSHOTS, HUB_BLOBS = "models--", "snapshots", "blobs"


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk: `manifest` is the manifest as plain data; the other fields are what drivers need from it.

    `matrices` describes the matrices of weights.bin by name.
    """

    folder: Path
    manifest: dict[str, Any]
    shape: ModelShape
    matrices: dict[str, Matrix]

    @property
    def name(self) -> str:
        """The model's name as given to `build`."""
        return str(self.manifest["model"]["name"])

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a generation."""
        return frozenset(self.manifest["model"]["eos_token_ids"])

    @property
    def ffn_matrices(self) -> int:
        """The number of weight matrices of an FFN: 3 (gate, up, down) or 2 (up, down)."""
        return int(self.manifest["model"]["ffn_matrices"])

    @property
    def dense_ffn_bytes(self) -> int:
        """The FFN weight bytes of all layers, which a dense step reads for each token."""
        return sum(self.matrices[name].bytes for name in self._ffn_names)

    @property
    def _ffn_names(self) -> list[str]:
        layers = range(self.shape.num_layers)
        parts = (*contract.FFN_PARTS, "gate_up")
        names = [contract.ffn_weight(layer, part) for layer in layers for part in parts]
        return [name for name in names if name in self.matrices]

    @property
    def layout(self) -> str:
        """What the rows of its matrices are: `priced` (input channels with prices) or `indexed` (neurons of prompt
        masks)."""
        return str(self.manifest["layout"])

    @property
    def has_integers(self) -> bool:
        """Whether matrices are stored as integers."""
        return not all(matrix.format.is_float for matrix in self.matrices.values())

    @property
    def one_dtype(self) -> bool:
        """Whether matrices, keys and values are all stored in the model's dtype."""
        return not self.has_integers and self.shape.kv == kv_formats.KV_FLOAT

    @property
    def linear_bytes(self) -> int:
        """The weight bytes of the linears of all layers, attention and FFN, which a dense step reads for each token."""
        return sum(matrix.bytes for name, matrix in self.matrices.items() if contract.in_a_layer(name))

    @property
    def head(self) -> Matrix:
        """The head; a tied one whose rows have no prices is the embedding."""
        return self.matrices[contract.HEAD if contract.HEAD in self.matrices else contract.EMBEDDING]

    @property
    def prices_head(self) -> bool:
        """Whether the head's rows have prices."""
        return self.layout == "priced" and self.head.major == "input"

    @property
    def sparse_bytes(self) -> int:
        """The bytes of those linears of the layers whose rows decode may skip."""
        return self.linear_bytes if self.layout == "priced" else self.dense_ffn_bytes

    @property
    def price_table(self) -> PriceTable | None:
        """The prices that calibration measured, None where it measured none."""
        table = self.manifest.get("price_table")
        return None if table is None else PriceTable.from_dict(table)

    @property
    def deployment(self) -> AnyDeployment:
        """The default deployment: which rows decode reads unless it is told otherwise."""
        manifest = self.manifest
        if self.layout == "priced":
            return price_deployment(float(manifest["price"]), self.price_table)
        by_rank = manifest["method"]["selection"] != "threshold"
        thresholds = None if by_rank else np.asarray(manifest["thresholds"], np.float32)
        return Deployment(
            thresholds,
            np.asarray(manifest["token_thresholds"], np.float32),
            refresh=Refresh(**manifest["refresh"]),
            survivors=np.asarray(manifest["survivors"], np.float32),
            ffn_matrices=self.ffn_matrices,
        )

    def file(self, name: str) -> Path:
        return self.folder / name

    @property
    def weights_file(self) -> Path:
        """The real path of weights.bin, which may be a link: ONNX Runtime follows no link to another folder."""
        return self.file(contract.WEIGHTS_FILE).resolve()


def open_artifact(folder: str | Path) -> Artifact:
    """Open an artifact and check that its files are there and have their sizes (hashes: `tda-export verify`).

    Raises:
        TdaError: The folder is not an artifact; its manifest is damaged, of a newer format, or names files outside the
            folder; or a file is missing, a link, or of another size than the manifest says.
    """
    folder = Path(folder)
    path = folder / contract.MANIFEST_FILE
    if not path.is_file():
        raise TdaError(
            f"{folder}: there is no {contract.MANIFEST_FILE}, so this is not an artifact. "
            "Make one with 'tda-export build'."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TdaError(f"{path}: not readable ({first_line(error)}). Build the artifact again.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != contract.FORMAT:
        raise TdaError(f"{path}: not a manifest of {contract.FORMAT}. Give a folder that 'tda-export build' made.")
    version = manifest.get("format_version")
    if type(version) is not int:
        raise TdaError(f"{path}: no format version. Build the artifact again.")
    if version > contract.FORMAT_VERSION:
        raise TdaError(
            f"{path}: artifact format {shown(version)} is newer than this tda-export ({contract.FORMAT_VERSION}). "
            "Update it."
        )
    if version < contract.FORMAT_VERSION:
        raise TdaError(
            f"{path}: artifact format {shown(version)} is older than this tda-export's ({contract.FORMAT_VERSION}). "
            "Build the artifact again."
        )
    try:
        _check_files(folder, manifest["files"])
        shape, matrices = check_manifest(manifest)
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError, UsageError) as error:
        raise TdaError(f"{path}: incomplete manifest ({first_line(error)}). Build the artifact again.") from error
    return Artifact(folder, manifest, shape, matrices)


def is_artifact(folder: Path) -> bool:
    """Return whether a folder is empty, or an artifact of any version with no files other than those its manifest
    lists."""
    try:
        if folder.is_dir() and not any(folder.iterdir()):
            return True
        manifest = json.loads((folder / contract.MANIFEST_FILE).read_text(encoding="utf-8"))
        known = {contract.MANIFEST_FILE, *manifest["files"]}
        return manifest["format"] == contract.FORMAT and all(
            path.name in known and path.is_file() for path in folder.iterdir()
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _check_files(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    for name, entry in files.items():
        parts = PurePosixPath(name).parts
        if len(parts) != 1 or len(name) > LONGEST_NAME or name in (".", "..") or any(c in name for c in "\\:\0"):
            raise TdaError(
                f"{folder}: the manifest names '{shown(name)}', which is not a file of this folder. "
                "Do not use this artifact."
            )
        path = folder / name
        if path.is_symlink():
            _check_link(folder, path)
        if not path.is_file():
            raise TdaError(f"{folder}: {shown(name)} is missing. Build the artifact again.")
        if not isinstance(entry["sha256"], str):
            raise ValueError(f"files.{name}.sha256")
        if path.stat().st_size != entry["size"]:
            raise TdaError(
                f"{path}: {path.stat().st_size} bytes, and the manifest says {shown(entry['size'])}: truncated or "
                "altered. Copy or build the artifact again."
            )
    for name in NEEDED_FILES:
        if name not in files:
            raise TdaError(f"{folder}: the manifest does not list {name}. Build the artifact again.")


def _check_link(folder: Path, path: Path) -> None:
    """Allow a link to a file of the folder or, in a hub's cache, to a blob of the same repository.

    Such a cache holds `models--org--name/snapshots/<revision>/…`, links to `models--org--name/blobs/<hash>`.
    """
    target, inside = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if not path.exists():  # also refuses a link to itself
        raise TdaError(f"{path}: a broken link. Copy or build the artifact again.")
    allowed = [inside]
    for parent in inside.parents:
        if parent.name == HUB_SNAPSHOTS and parent.parent.name.startswith(HUB_REPOSITORY):
            allowed.append(parent.parent / HUB_BLOBS)
    if target.parent not in allowed:
        raise TdaError(
            f"{path} is a link to outside the folder. Do not use this artifact, or, if the link is yours, copy the "
            "folder with what its links lead to ('cp -rL')."
        )
