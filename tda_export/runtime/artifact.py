"""Open an artifact folder: read its manifest, and refuse what is damaged, foreign or unsafe."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from tda_export.errors import TdaError, UsageError
from tda_export.graph import contract
from tda_export.graph.contract import DTYPES, ModelShape
from tda_export.packing import PACKINGS
from tda_export.pricing import PriceTable
from tda_export.runtime.deployment import AnyDeployment, Deployment, Refresh, price_deployment
from tda_export.weights.matrix import Matrix, read_matrix

NEEDED_FILES = (
    contract.PREFILL_FILE,
    contract.DECODE_FILE,
    contract.WEIGHTS_FILE,
    contract.TOKENIZER_FILE,
)


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk: `manifest` is its content as plain data, the rest is what drivers need of it.

    `matrices` describes the matrices of weights.bin by name.
    """

    folder: Path
    manifest: dict[str, Any]
    shape: ModelShape
    matrices: dict[str, Matrix]

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
        """Weight matrices of an FFN: gate, up and down, or up and down."""
        return int(self.manifest["model"]["ffn_matrices"])

    @property
    def dense_ffn_bytes(self) -> int:
        """FFN weight bytes of all layers, which a dense step reads for a token."""
        return sum(self.matrices[name].bytes for name in self._ffn_names)

    @property
    def _ffn_names(self) -> list[str]:
        layers = range(self.shape.num_layers)
        parts = (*contract.FFN_PARTS, "gate_up")
        names = [contract.ffn_weight(layer, part) for layer in layers for part in parts]
        return [name for name in names if name in self.matrices]

    @property
    def layout(self) -> str:
        """What the rows of its matrices are: `priced` (input channels with prices) or `indexed` (neurons of masks)."""
        return str(self.manifest["layout"])

    @property
    def linear_bytes(self) -> int:
        """Weight bytes of the linears of all layers, attention and FFN, which a dense step reads for a token."""
        return sum(matrix.bytes for name, matrix in self.matrices.items() if contract.in_a_layer(name))

    @property
    def sparse_bytes(self) -> int:
        """Those of them that decode may skip rows of."""
        return self.linear_bytes if self.layout == "priced" else self.dense_ffn_bytes

    @property
    def price_table(self) -> PriceTable | None:
        """What calibration measured of prices, None where nothing was."""
        table = self.manifest.get("price_table")
        return None if table is None else PriceTable.from_dict(table)

    @property
    def deployment(self) -> AnyDeployment:
        """What decode reads unless it is told otherwise."""
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
    except (OSError, ValueError, RecursionError) as error:
        raise TdaError(f"{path}: not readable ({error}). Build the artifact again.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != contract.FORMAT:
        raise TdaError(f"{path}: not a manifest of {contract.FORMAT}. Give a folder that 'tda-export build' made.")
    version = manifest.get("format_version")
    if not isinstance(version, int):
        raise TdaError(f"{path}: no format version. Build the artifact again.")
    if version > contract.FORMAT_VERSION:
        raise TdaError(
            f"{path}: artifact format {version} is newer than this tda-export ({contract.FORMAT_VERSION}). Update it."
        )
    if version < contract.FORMAT_VERSION:
        raise TdaError(
            f"{path}: artifact format {version} is older than this tda-export's ({contract.FORMAT_VERSION}). "
            "Build the artifact again."
        )
    try:
        _check_files(folder, manifest["files"])
        shape = ModelShape(**manifest["shape"])
        matrices = {name: read_matrix(name, entry) for name, entry in manifest["matrices"].items()}
        _check_content(manifest, shape, matrices)
    except (KeyError, TypeError, AttributeError, ValueError, UsageError) as error:
        raise TdaError(f"{path}: incomplete manifest ({error}). Build the artifact again.") from error
    return Artifact(folder, manifest, shape, matrices)


def is_artifact(folder: Path) -> bool:
    """Tell whether a folder is empty, or an artifact, of any version, that holds no file but its manifest's."""
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


def _check_content(manifest: dict[str, Any], shape: ModelShape, matrices: dict[str, Matrix]) -> None:
    """Check what the runtime and verify read later; what is missing or wrong is named by a KeyError or ValueError."""
    for name, value in asdict(shape).items():
        if name != "dtype":
            _require(type(value) is int and value > 0, f"shape.{name}")
    _require(shape.dtype in DTYPES.values(), "shape.dtype")
    model = manifest["model"]
    _require(all(isinstance(model[key], str) for key in ("name", "fingerprint")), "model.name or model.fingerprint")
    _require(type(model["ffn_matrices"]) is int, "model.ffn_matrices")
    eos = model["eos_token_ids"]
    _require(isinstance(eos, list) and all(type(token) is int for token in eos), "model.eos_token_ids")
    _require(isinstance(manifest["spec"], dict), "spec")
    checks = {"indexed": _check_indexed, "priced": _check_priced}
    _require(manifest["layout"] in checks, "layout")
    _check_weights(manifest, shape, matrices)
    checks[manifest["layout"]](manifest, shape, matrices)


def _check_priced(manifest: dict[str, Any], shape: ModelShape, matrices: dict[str, Matrix]) -> None:
    _require(manifest["method"] == {"name": "priced"}, "method")
    price = manifest["price"]
    _require(type(price) in (int, float) and math.isfinite(price) and price >= 0, "price")
    _require(manifest["packing"] in PACKINGS, "packing")
    if manifest["price_table"] is not None:
        _require(PriceTable.from_dict(manifest["price_table"]).packing == manifest["packing"], "packing")
    for name, matrix in matrices.items():
        if contract.in_a_layer(name):
            entry = manifest["weights"][contract.row_price(name)]
            _require(matrix.major == "input", f"matrices.{name}.major")
            _require((entry["shape"], entry["dtype"]) == ([matrix.rows], "float32"), f"weights.{name}.row_price")


def _check_indexed(manifest: dict[str, Any], shape: ModelShape, matrices: dict[str, Matrix]) -> None:
    method, thresholds = manifest["method"], manifest["thresholds"]
    _require(method.get("statistic") in ("magnitude", "activation"), "method.statistic")
    _require(method.get("selection") in ("threshold", "topk"), "method.selection")
    density = method.get("density")
    _require(type(method["two_levels"]) is bool, "method.two_levels")
    _require(method["selection"] == "threshold" or (isinstance(density, float) and 0 < density <= 1), "method.density")
    _require(len(thresholds) == shape.num_layers and all(map(math.isfinite, thresholds)), "thresholds")
    for name in ("token_thresholds", "survivors"):
        values = manifest[name]
        _require(len(values) == shape.num_layers and all(map(math.isfinite, values)), name)
    Refresh(**manifest["refresh"])
    last = contract.ffn_weight(shape.num_layers - 1, "up")
    _require(manifest["weights"][last]["shape"] == [shape.ffn_size, shape.hidden_size], "shape.ffn_size")


def _check_weights(manifest: dict[str, Any], shape: ModelShape, matrices: dict[str, Matrix]) -> None:
    weights, size = manifest["weights"], manifest["files"][contract.WEIGHTS_FILE]["size"]
    for name, entry in weights.items():
        numbers = [entry["offset"], *entry["shape"]]
        _require(all(type(number) is int and number >= 0 for number in numbers), f"weights.{name}")
        _require(entry["offset"] + contract.tensor_bytes(entry["shape"], entry["dtype"]) <= size, f"weights.{name}")
    for file in (contract.PREFILL_FILE, contract.DECODE_FILE):
        _require(set(manifest["graph_weights"][file]) <= weights.keys(), f"graph_weights.{file}")
    for name, matrix in matrices.items():
        stored = {"dtype": matrix.format.name, "shape": list(matrix.shape)}
        _require({key: weights[name][key] for key in stored} == stored, f"matrices.{name}")
    for layer in range(shape.num_layers):
        _require(contract.ffn_weight(layer, "down") in matrices, f"matrices.{contract.ffn_weight(layer, 'down')}")
    # Embeddings of another width than M come with a projection.
    width = weights[contract.PROJECT_IN]["shape"][1] if contract.PROJECT_IN in weights else shape.hidden_size
    _require(weights[contract.EMBEDDING]["shape"] == [shape.vocab_size, width], "shape.vocab_size")
    last = contract.ffn_weight(shape.num_layers - 1, "down")
    _require(last in weights and contract.ffn_weight(shape.num_layers, "down") not in weights, "shape.num_layers")
    _require(weights[last]["shape"] == [shape.ffn_size, shape.hidden_size], "shape.ffn_size")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


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
        if not isinstance(entry["sha256"], str):
            raise ValueError(f"files.{name}.sha256")
        if path.stat().st_size != entry["size"]:
            raise TdaError(
                f"{path}: {path.stat().st_size} bytes, and the manifest says {entry['size']}: truncated or altered. "
                "Copy or build the artifact again."
            )
    for name in NEEDED_FILES:
        if name not in files:
            raise TdaError(f"{folder}: the manifest does not list {name}. Build the artifact again.")
