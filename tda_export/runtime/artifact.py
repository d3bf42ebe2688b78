"""Open an artifact folder: read its manifest, and refuse what is damaged, foreign or unsafe."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tda_export.errors import TdaError
from tda_export.graph import contract
from tda_export.graph.contract import ModelShape

NEEDED_FILES = (
    contract.PREFILL_FILE,
    contract.DECODE_FILE,
    contract.WEIGHTS_FILE,
    contract.TOKENIZER_FILE,
)
# What the runtime and verify read later.
NEEDED_KEYS = {
    "model": ("name", "fingerprint", "eos_token_ids", "ffn_matrices"),
    "method": ("statistic",),
    "weights": (contract.EMBEDDING,),
    "graph_weights": (contract.PREFILL_FILE, contract.DECODE_FILE),
}


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk: `manifest` is its content as plain data, the rest is what drivers need of it."""

    folder: Path
    manifest: dict[str, Any]
    shape: ModelShape

    @property
    def name(self) -> str:
        """The model's name as given to build."""
        return str(self.manifest["model"]["name"])

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a generation."""
        return frozenset(self.manifest["model"]["eos_token_ids"])

    @property
    def ffn_matrices(self) -> int:
        """Weight matrices of an FFN: gate, up and down."""
        return int(self.manifest["model"]["ffn_matrices"])

    @property
    def bytes_per_neuron(self) -> int:
        """FFN weight bytes that one neuron of one layer takes."""
        return self.ffn_matrices * self.shape.hidden_size * (4 if self.shape.dtype == "float32" else 2)

    def file(self, name: str) -> Path:
        return self.folder / name


def open_artifact(folder: str | Path) -> Artifact:
    """Open an artifact and check that its files are there and have their sizes (hashes: `tda-export verify`).

    Raises:
        TdaError: The folder is no artifact, its manifest is damaged, of a newer format, or names files outside the
            folder, or a file is missing, a link or of another size than the manifest says.
    """
    folder = Path(folder)
    path = folder / contract.MANIFEST_FILE
    if not path.is_file():
        raise TdaError(
            f"{folder}: no {contract.MANIFEST_FILE} there, so this is no artifact. Make one with 'tda-export build'."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TdaError(f"{path}: not readable ({error}). Build the artifact again.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != contract.FORMAT:
        raise TdaError(f"{path}: not a manifest of {contract.FORMAT}. Give a folder that 'tda-export build' made.")
    version = manifest.get("format_version")
    if not isinstance(version, int) or version > contract.FORMAT_VERSION:
        raise TdaError(
            f"{path}: artifact format {version} is newer than this tda-export ({contract.FORMAT_VERSION}). Update it."
        )
    try:
        _check_files(folder, manifest["files"])
        shape = ModelShape(**manifest["shape"])
        missing = [f"{part}.{key}" for part, keys in NEEDED_KEYS.items() for key in keys if key not in manifest[part]]
        if missing:
            raise KeyError(missing[0])
    except (KeyError, TypeError, AttributeError) as error:
        raise TdaError(f"{path}: incomplete manifest ({error}). Build the artifact again.") from error
    return Artifact(folder, manifest, shape)


def _check_files(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    for name, entry in files.items():
        parts = PurePosixPath(name).parts
        if len(parts) != 1 or name in (".", "..") or "\\" in name or ":" in name:
            raise TdaError(
                f"{folder}: the manifest names {name!r}, which is not a file of this folder. Do not use this artifact."
            )
        path = folder / name
        if path.is_symlink() and path.resolve().parent != folder.resolve():
            raise TdaError(f"{folder}: {name} is a link out of the folder. Do not use this artifact.")
        if not path.is_file():
            raise TdaError(f"{folder}: {name} is missing. Build the artifact again.")
        if path.stat().st_size != entry["size"]:
            raise TdaError(
                f"{path}: {path.stat().st_size} bytes, and the manifest says {entry['size']}: truncated or altered. "
                "Copy or build the artifact again."
            )
    for name in NEEDED_FILES:
        if name not in files:
            raise TdaError(f"{folder}: the manifest does not list {name}. Build the artifact again.")
