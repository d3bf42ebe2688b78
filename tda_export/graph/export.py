"""Build an artifact: weights, graphs, tokenizer and manifest in one folder, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

import tda_export
from tda_export.calibration.budgets import Allocation, Budget
from tda_export.errors import TdaError
from tda_export.files import atomic_folder, sha256
from tda_export.graph import contract
from tda_export.graph.decode import build_decode
from tda_export.graph.decoder import model_shape
from tda_export.graph.genai import genai_config
from tda_export.graph.method import Method
from tda_export.graph.prefill import Prior, build_prefill
from tda_export.graph.seal import SEAL_KEY, manifest_hash
from tda_export.graph.weights_file import WeightTable, plan_weights, write_weights
from tda_export.models.source import ModelSource
from tda_export.progress import progress
from tda_export.runtime.deployment import NO_REFRESH, Refresh
from tda_export.versions import installed_versions

RECORDED_PACKAGES = ("onnx", "onnx-ir", "torch", "transformers")


@dataclass(frozen=True)
class BuildRequest:
    """What to build. `thresholds` [L] are the defaults of the prefill graph; top-k methods carry zeros.

    `up_rms`, float [L, F], comes from calibration and belongs to two-level methods; their token thresholds are the
    allocation's. `prior` is what the statistics of a prompt begin with.
    """

    source: ModelSource
    dtype: str  # a value of contract.DTYPES
    method: Method
    thresholds: list[float]
    budget: Budget
    allocation: Allocation | None = None
    calibration_file: Path | None = None
    calibration: dict[str, Any] | None = None  # provenance
    up_rms: torch.Tensor | None = None
    prior: Prior | None = None
    refresh: Refresh = NO_REFRESH

    def __post_init__(self) -> None:
        assert self.method.two_levels == (self.up_rms is not None), "a two-level method needs up_rms"

    @property
    def token_thresholds(self) -> list[float]:
        """Defaults of the decode graph, [L]; 0 is off."""
        chosen = self.allocation.token_thresholds if self.allocation else []
        return chosen or [0.0] * self.source.spec.num_layers

    @property
    def expected_sparsity(self) -> float:
        """Share of the FFN bytes that a token is expected not to read, refreshes included."""
        assert self.allocation is not None
        return self.refresh.sparsity(self.allocation.sparsity)

    @property
    def survivors(self) -> list[float]:
        """Expected share of a mask's neurons that a token does not skip, [L]."""
        if self.allocation is None or not self.allocation.token_density:
            return [1.0] * self.source.spec.num_layers
        pairs = zip(self.allocation.token_density, self.allocation.density, strict=True)
        return [token / mask if mask else 1.0 for token, mask in pairs]


def export_artifact(request: BuildRequest, output: Path, *, quiet: bool, check: Callable[[Path], None]) -> None:
    """Write the artifact to a temporary sibling of `output`, check it there, and rename it.

    Args:
        request: Model, method, thresholds.
        output: The artifact folder.
        quiet: No progress.
        check: Called with the finished temporary folder; what it raises means that nothing is left behind.

    Raises:
        TdaError: The checkpoint does not fit its configuration, the disk is full, or `check` failed.
    """
    source, spec = request.source, request.source.spec
    plan = list(plan_weights(spec, source.weights(), request.dtype, request.up_rms))
    size = sum(int(np.prod(p.shape)) * contract.DTYPE_BYTES[p.dtype] for p in plan)
    free = shutil.disk_usage(output.absolute().parent).free
    if size > free:
        raise TdaError(f"{output}: the weights take {size / 2**20:,.0f} MiB and the disk has {free / 2**20:,.0f} free.")
    with atomic_folder(output) as folder:
        with progress("Writing weights", size, quiet=quiet) as advance:
            table, weights_sha256 = write_weights(plan, folder / contract.WEIGHTS_FILE, advance)
        thresholds = np.asarray(request.thresholds, np.float32)
        prefill = build_prefill(spec, table, request.dtype, request.method, thresholds, request.prior)
        decode = build_decode(spec, table, request.dtype, request.method, np.asarray(request.token_thresholds, "f4"))
        explicit = build_decode(spec, table, request.dtype, request.method, explicit=True)
        graphs = dict(zip(contract.GRAPH_FILES, (prefill, decode, explicit), strict=True))
        _save_tokenizer(source, folder)
        _write_json(folder / contract.GENERATION_CONFIG_FILE, source.generation_config)
        _write_json(folder / contract.GENAI_CONFIG_FILE, genai_config(request.source, request.dtype))
        if request.calibration_file:
            shutil.copyfile(request.calibration_file, folder / contract.CALIBRATION_FILE)
        known = {contract.WEIGHTS_FILE: weights_sha256}
        manifest = _manifest(request, folder, table, graphs, known)
        _save_graphs(graphs, folder, manifest)
        _write_json(folder / contract.MANIFEST_FILE, manifest)
        check(folder)


def _save_graphs(graphs: dict[str, ir.Model], folder: Path, manifest: dict[str, Any]) -> None:
    """Save the graphs with the manifest's hash, and enter theirs in the manifest."""
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


def _save_tokenizer(source: ModelSource, folder: Path) -> None:
    """Save the tokenizer and its default chat template; further templates come as a folder, which is left out."""
    try:
        source.tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # tokenizers' way of reporting what the operating system said
        raise OSError(str(error)) from error
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)


def _manifest(
    request: BuildRequest, folder: Path, table: WeightTable, graphs: dict[str, ir.Model], known: dict[str, str]
) -> dict[str, Any]:
    spec, shape = request.source.spec, model_shape(request.source.spec, request.dtype)
    files = sorted(path for path in folder.iterdir() if path.name != contract.MANIFEST_FILE)
    two_levels = request.method.two_levels
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
        },
        "shape": asdict(shape),
        "spec": asdict(spec),
        "method": asdict(request.method),
        "budget": request.budget.describe(),
        "thresholds": request.thresholds,
        "token_thresholds": request.token_thresholds,
        "survivors": request.survivors,
        "prior_tokens": request.prior.tokens if request.prior else 0.0,
        "refresh": asdict(request.refresh),
        "expected": asdict(request.allocation) | {"sparsity": request.expected_sparsity} if request.allocation else {},
        "calibration": request.calibration or {},
        "files": {path.name: _file_entry(path, known.get(path.name)) for path in files},
        "io": {
            contract.PREFILL_FILE: _io(contract.prefill_inputs(shape), contract.prefill_outputs(shape)),
            contract.DECODE_FILE: _io(
                contract.decode_inputs(shape, two_levels=two_levels), contract.decode_outputs(shape)
            ),
            contract.EXPLICIT_DECODE_FILE: _io(
                contract.decode_inputs(shape, two_levels=two_levels, explicit=True), contract.decode_outputs(shape)
            ),
        },
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


def _io(inputs: list[contract.IoTensor], outputs: list[contract.IoTensor]) -> dict[str, list[dict[str, Any]]]:
    return {"inputs": [asdict(tensor) for tensor in inputs], "outputs": [asdict(tensor) for tensor in outputs]}
