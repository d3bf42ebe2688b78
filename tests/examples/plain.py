"""An artifact in plain ONNX Runtime, as in an application without this package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort

from tda_export.graph import contract


class PlainArtifact:
    """An artifact in an application: its manifest, and sessions without registered libraries."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = json.loads((folder / contract.MANIFEST_FILE).read_text())
        self.shape = contract.ModelShape(**self.manifest["shape"])
        self.layers = range(self.shape.num_layers)

    def run(self, file: str, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        session = ort.InferenceSession(self.folder / file, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, feeds), strict=True))

    def needed(self, tokens: np.ndarray, past: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """Return the inputs without defaults, given the outputs of the call before."""
        pairs = [(contract.past_key, contract.present_key), (contract.past_value, contract.present_value)]
        empty = np.zeros((1, self.shape.num_kv_heads, 0, self.shape.head_size), np.float32)
        cache = {
            given(layer): past[present(layer)] if past else empty for given, present in pairs for layer in self.layers
        }
        length = next(iter(cache.values())).shape[2] + tokens.shape[1]
        return {contract.INPUT_IDS: tokens, contract.ATTENTION_MASK: np.ones((1, length), np.int64), **cache}
