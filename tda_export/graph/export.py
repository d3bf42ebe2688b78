"""Build an artifact: weights, graphs, tokenizer and manifest in one folder, atomically."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

import tda_export
from tda_export.errors import TdaError, UsageError
from tda_export.files import as_os_error, atomic_folder, sha256
from tda_export.graph import contract, kv_formats
from tda_export.graph.decoder import model_shape
from tda_export.graph.genai import genai_config
from tda_export.graph.seal import SEAL_KEY, manifest_hash
from tda_export.graph.storage import Storage
from tda_export.graph.weight_plan import Rows, plan_weights
from tda_export.graph.weights_file import WeightTable, write_weights
from tda_export.models.notes import say
from tda_export.models.quantised import kept_of
from tda_export.models.source import ModelSource
from tda_export.models.spec import DecoderSpec
from tda_export.progress import progress
from tda_export.versions import installed_versions

RECORDED_PACKAGES = ("onnx", "onnx-ir", "torch", "transformers")


class Design(Protocol):
    """What a layout stores and builds; `layout` is its name in the manifest."""

    layout: str

    @property
    def rows(self) -> Rows:
        """The meaning of the rows of the layers' matrices."""
        ...

    @property
    def expected(self) -> dict[str, Any]:
        """The values that calibration expects, as plain data."""
        ...

    def graphs(self, spec: DecoderSpec, table: WeightTable, dtype: str, kv: str) -> dict[str, ir.Model]:
        """Build the graphs, by file name, with keys and values stored as `kv` says."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return the manifest's entries that only this layout has."""
        ...


@dataclass(frozen=True)
class BuildRequest:
    """What to build: a model, the storage and the design of its weights, and how keys and values are stored (one of
    `kv_formats.KV_FORMATS`)."""

    source: ModelSource
    storage: Storage
    design: Design
    budget: dict[str, Any]  # as the user gave it
    calibration_file: Path | None = None
    calibration: dict[str, Any] | None = None  # provenance
    kv: str = kv_formats.KV_FLOAT

    @property
    def dtype(self) -> str:
        """The dtype of activations, a value of `contract.DTYPES`."""
        return self.storage.dtype


def check_kv(kv: str, dtype: str) -> None:
    """Refuse a way to store keys and values (one of `kv_formats.KV_FORMATS`) beside a dtype that takes as little.

    Raises:
        UsageError: It is float16 beside another dtype than float32.
    """
    if kv == kv_formats.KV_FLOAT16 and dtype != "float32":
        raise UsageError(
            f"--kv float16 is for --dtype fp32. With {dtype}, keys and values take 16 bits already: leave --kv out."
        )


def export_artifact(request: BuildRequest, output: Path, *, quiet: bool, check: Callable[[Path], None]) -> None:
    """Write the artifact to a temporary sibling of `output`, check it there, and rename it.

    Args:
        request: Model, method, thresholds.
        output: The artifact folder.
        quiet: Show no progress.
        check: Called with the finished temporary folder. If it raises, the folder is removed.

    Raises:
        UsageError: See `check_kv`.
        TdaError: The checkpoint does not fit its configuration, the disk is full, or `check` failed.
    """
    check_kv(request.kv, request.dtype)
    source, spec = request.source, request.source.spec
    tokenizer = source.tokenizer  # loaded first, so that a damaged one fails before anything is written
    plan = list(plan_weights(spec, source.weights(), request.storage, request.design.rows))
    size = sum(planned.bytes for planned in plan)
    free = shutil.disk_usage(output.absolute().parent).free
    if size > free:
        raise TdaError(
            f"{output}: the weights take {size / 2**20:,.0f} MiB and the disk has {free / 2**20:,.0f} MiB free. "
            "Free some space, or choose another output."
        )
    with atomic_folder(output) as folder:
        with progress("Writing weights", size, quiet=quiet) as advance:
            table, weights_sha256 = write_weights(plan, folder / contract.WEIGHTS_FILE, advance)
        graphs = request.design.graphs(spec, table, request.dtype, request.kv)
        _save_tokenizer(tokenizer, source.name, folder)
        _write_json(folder / contract.GENERATION_CONFIG_FILE, source.generation_config)
        if request.kv != kv_formats.KV_INT8:  # GenAI has no scales of keys and values
            genai = genai_config(request.source, request.dtype, layout=request.design.layout)
            _write_json(folder / contract.GENAI_CONFIG_FILE, genai)
        if request.calibration_file:
            shutil.copyfile(request.calibration_file, folder / contract.CALIBRATION_FILE)
        known = {contract.WEIGHTS_FILE: weights_sha256}
        manifest = _manifest(request, folder, table, graphs, known)
        _save_graphs(graphs, folder, manifest)
        _write_json(folder / contract.MANIFEST_FILE, manifest)
        check(folder)


def _save_graphs(graphs: dict[str, ir.Model], folder: Path, manifest: dict[str, Any]) -> None:
    """Save the graphs with the manifest's hash in them, and add their hashes to the manifest."""
    files = manifest["files"]
    files |= dict.fromkeys(graphs)
    seal = manifest_hash(manifest)
    for name, graph in graphs.items():
        graph.metadata_props[SEAL_KEY] = seal
        ir.save(graph, folder / name)
        files[name] = _file_entry(folder / name)


def _file_entry(path: Path, known: str | None = None) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": known or sha256(path)}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _save_tokenizer(tokenizer: Any, name: str, folder: Path) -> None:
    """Save the tokenizer and its default chat template; further templates would be saved as a folder, which is left
    out."""
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # of tokenizers
        raise as_os_error(error) from error
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    if tokenizer.chat_template and not (folder / contract.CHAT_TEMPLATE_FILE).is_file():
        say(
            f"{name}: none of its chat templates is named 'default', so the artifact has none. To have one, name it so "
            "in tokenizer_config.json and build again."
        )


def _manifest(
    request: BuildRequest, folder: Path, table: WeightTable, graphs: dict[str, ir.Model], known: dict[str, str]
) -> dict[str, Any]:
    spec, shape = request.source.spec, model_shape(request.source.spec, request.dtype, request.kv)
    sizes = asdict(shape)
    kv = sizes.pop("kv")
    files = sorted(path for path in folder.iterdir() if path.name != contract.MANIFEST_FILE)
    described = request.design.describe()
    two_levels = described["method"].get("two_levels", False)
    io = contract.graph_io(shape, request.design.layout, two_levels=two_levels)
    return {
        "format": contract.FORMAT,
        "format_version": contract.FORMAT_VERSION,
        "versions": {"tda-export": tda_export.__version__} | installed_versions(RECORDED_PACKAGES),
        "model": {
            "name": request.source.name,
            "architecture": spec.architecture,
            "fingerprint": request.source.fingerprint,
            "eos_token_ids": request.source.eos_token_ids,
            "ffn_matrices": len(spec.ffn_parts),
            "quantization": _quantization(request),
        },
        "shape": sizes,
        "kv": kv,
        "spec": asdict(spec),
        "budget": request.budget,
        **described,
        "calibration": request.calibration or {},
        "files": {path.name: _file_entry(path, known.get(path.name)) for path in files},
        "io": {file: _io(*tensors) for file, tensors in io.items()},
        "layout": request.design.layout,
        "matrices": {name: matrix.describe() for name, matrix in table.matrices.items()},
        "weights": {
            name: {
                "dtype": np.dtype(tensor.dtype.numpy()).name,
                "shape": list(tensor.shape.numpy()),
                "offset": tensor.offset,
            }
            for name, tensor in table.items()
        },
        "graph_weights": {
            file: [name for name in table if name in model.graph.initializers] for file, model in graphs.items()
        },
    }


def _quantization(request: BuildRequest) -> dict[str, Any] | None:
    """Describe how weights became integers; None where they are floats."""
    known = request.source.quantisation
    if known is None:
        return (
            {"quantizer": {"name": request.storage.quantizer, "symmetric": False}}
            if request.storage.has_integers
            else None
        )
    return kept_of(known)


def _io(inputs: list[contract.IoTensor], outputs: list[contract.IoTensor]) -> dict[str, list[dict[str, Any]]]:
    return {"inputs": [asdict(tensor) for tensor in inputs], "outputs": [asdict(tensor) for tensor in outputs]}
