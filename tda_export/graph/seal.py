"""The seal: a hash of the manifest in the graphs' metadata, so that an altered manifest does not pass verification.

The manifest holds the hash of every file, graphs included. The graphs hold the hash of the manifest without the graphs'
hashes. The check detects accidental and manual changes. It is not a signature: whoever writes both can write anything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from tda_export.errors import shown
from tda_export.graph import contract
from tda_export.runtime.artifact import Artifact

SEAL_KEY = "tda_export.manifest_sha256"  # in a graph's metadata_props


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest's content: of its JSON with sorted keys and without spaces.

    Only the names of the graphs count, since the graphs' own hashes depend on this one.
    """
    files = {name: None if name in contract.GRAPH_FILES else entry for name, entry in manifest["files"].items()}
    content = json.loads(json.dumps({**manifest, "files": files}))
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def seal_problem(artifact: Artifact, graphs: Mapping[str, onnx.ModelProto]) -> str | None:
    """Return how a manifest disagrees with the graphs, or None where it does not.

    Args:
        artifact: The artifact, whose manifest is checked.
        graphs: Its graphs by file name, without weights.
    """
    manifest = artifact.manifest
    for name, (file, tensor, values) in _defaults(artifact).items():
        found = _default(graphs[file], tensor)
        if found is None or not np.array_equal(found, np.asarray(values, np.float32)):
            return f"{name} is not what {file} has by default"
    expected = manifest_hash(manifest)
    for file, graph in graphs.items():
        seals = [item.value for item in graph.metadata_props if item.key == SEAL_KEY]
        if not seals:
            return f"{file} does not say which manifest it belongs to"
        if seals != [expected]:
            return f"altered since the build: {file} belongs to a manifest of SHA-256 {shown(seals[0])}"
    return None


def _defaults(artifact: Artifact) -> dict[str, tuple[str, str, list[float]]]:
    """List the manifest's values that are defaults of the graphs' inputs: file, input and values."""
    manifest = artifact.manifest
    if artifact.layout == "priced":
        return {"price": (contract.DECODE_FILE, contract.PRICE, [manifest["price"]])}
    defaults = {
        "thresholds": (contract.PREFILL_FILE, contract.THRESHOLDS, manifest["thresholds"]),
        "prior_tokens": (contract.PREFILL_FILE, contract.PAST_STATS_WEIGHT, [manifest["prior_tokens"]]),
    }
    if manifest["method"]["two_levels"]:
        defaults["token_thresholds"] = (contract.DECODE_FILE, contract.TOKEN_THRESHOLDS, manifest["token_thresholds"])
    return defaults


def _default(graph: onnx.ModelProto, name: str) -> np.ndarray | None:
    for tensor in graph.graph.initializer:
        if tensor.name == name and tensor.data_location != onnx.TensorProto.EXTERNAL:
            return onnx.numpy_helper.to_array(tensor)
    return None
