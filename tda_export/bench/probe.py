"""The data for choosing a benchmark's thresholds: scores of the prompt, and inputs of the FFNs for some of its
tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tda_export.bench.runners import SparseRunner, ffn_inputs
from tda_export.graph import contract
from tda_export.graph.derive import artifact_spec
from tda_export.graph.method import kept_neurons
from tda_export.models.ffn_modules import ACTIVATIONS
from tda_export.runtime.artifact import Artifact
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import prefill
from tda_export.runtime.session import STORAGE, Sessions, map_weight

PROBED_TOKENS = 16
SMALLEST = 1e-12  # the smallest threshold of a relative magnitude


class Probe:
    """Looks at an artifact's neurons on a prompt."""

    def __init__(self, artifact: Artifact, sessions: Sessions, prompt: Sequence[int]) -> None:
        self._artifact, self._sessions, self._prompt = artifact, sessions, list(prompt)
        self._spec = artifact_spec(artifact)

    def active_share(self, runner: SparseRunner) -> float:
        """Return the share of the prompt mask's neurons that ReLU leaves active on some of the prompt's tokens; 1
        without ReLU."""
        spec = self._spec
        if spec.activation != "relu":
            return 1.0
        active, seen = 0, 0
        for layer, x in enumerate(self._probed_inputs()):
            rows = slice(None) if runner.mask is None else runner.mask.indices(layer)
            products = self._products(layer, spec.ffn_parts[0], x)[rows]
            active, seen = active + int((products > 0).sum()), seen + products.size
        return active / seen

    def _probed_inputs(self) -> list[np.ndarray]:
        """Return the input of every FFN for the prompt's last tokens: L arrays, float32 [tokens, M]."""
        split = len(self._prompt) - min(PROBED_TOKENS, len(self._prompt) // 2)
        return ffn_inputs(self._artifact, self._sessions, self._prompt[:split], self._prompt[split:])

    def truncation_thresholds(self, density: float) -> np.ndarray:
        """Choose thresholds of r_i(t) that the share `density` of neurons reaches on the prompt's last tokens; float32
        [L]."""
        spec, thresholds = self._spec, []
        for layer, x in enumerate(self._probed_inputs()):
            first, *rest = (self._products(layer, part, x) for part in spec.ffn_parts[:-1])
            h = ACTIVATIONS[spec.activation](torch.from_numpy(first)).numpy() * (rest[0] if rest else 1.0)
            squares = h**2 * map_weight(self._artifact, contract.down_squared_norms(layer))[:, None]  # [F, tokens]
            relative = np.sqrt(squares / squares.sum(axis=0))
            # Zeros are never kept; ReLU makes more of them than may be dropped.
            thresholds.append(max(np.quantile(relative, 1.0 - density), SMALLEST))
        return np.array(thresholds, np.float32)

    def _products(self, layer: int, part: str, x: np.ndarray) -> np.ndarray:
        """Multiply FFN inputs, float32 [tokens, M], by the rows of all neurons: float32 [F, tokens]."""
        products = _as_float32(self._artifact, contract.ffn_weight(layer, part)) @ x.T
        if contract.ffn_bias(layer, part) in self._artifact.manifest["weights"]:
            products += _as_float32(self._artifact, contract.ffn_bias(layer, part))[:, None]
        return products

    def score_thresholds(self, density: float) -> np.ndarray:
        """Find the scores between the last neuron that is kept and the next, float32 [L]."""
        shape = self._artifact.shape
        cache = KvCache(shape, self._sessions.provider, len(self._prompt))
        _, mask = prefill(self._sessions, shape, self._prompt, cache)
        weight = mask.stats[contract.PAST_STATS_WEIGHT].numpy()
        kept = kept_neurons(density, shape.ffn_size)
        borders = []
        for layer in range(shape.num_layers):
            stats = mask.stats[contract.past_neuron_stats(layer)].numpy()
            scores = np.sort(np.sqrt(stats[contract.SCORE_ROW] / weight))[::-1]
            borders.append(0.0 if kept == len(scores) else (scores[kept - 1] + scores[kept]) / 2)
        return np.array(borders, np.float32)

    def token_thresholds(self, runner: SparseRunner, wanted: float) -> tuple[np.ndarray, float]:
        """Choose thresholds that keep the share `wanted` of all up and down rows on some tokens; count on others what
        they keep."""
        assert runner.mask is not None
        tokens = runner.steps(2 * PROBED_TOKENS)
        inputs = ffn_inputs(self._artifact, self._sessions, self._prompt, tokens)
        thresholds, left, spec = [], 0, self._spec
        for layer, x in enumerate(inputs):
            kept = runner.mask.indices(layer)
            first = self._products(layer, spec.ffn_parts[0], x)[kept]  # [K, tokens]
            scale = map_weight(self._artifact, contract.neuron_scale(layer))[kept]
            activated = ACTIVATIONS[spec.activation](torch.from_numpy(first)).numpy()
            estimates = np.abs(activated) * scale[:, None]
            dropped = 1.0 - wanted * self._artifact.shape.ffn_size / len(kept)
            thresholds.append(np.quantile(estimates[:, :PROBED_TOKENS], max(dropped, 0.0)))
            others = estimates[:, PROBED_TOKENS:]
            left += int(((others >= thresholds[-1]) & (others > 0)).sum())
        neurons = self._artifact.shape.num_layers * self._artifact.shape.ffn_size
        return np.array(thresholds, np.float32), left / PROBED_TOKENS / neurons


def _as_float32(artifact: Artifact, name: str) -> np.ndarray:
    array = map_weight(artifact, name)
    if artifact.shape.dtype in STORAGE:  # bfloat16: the upper half of a float32
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)
