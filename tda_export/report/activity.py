"""Which neurons are active for which tokens, measured with an artifact's own graphs.

docs/architecture.md defines relative magnitudes r_i(t) and neuron scores s_i. A token's active neurons are the half
with the largest relative magnitudes, a text's important neurons the half with the largest scores.
Source: TDA, arXiv 2408.11393 (Figures 3 to 11, Table 5).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from tda_export.graph import contract
from tda_export.graph.derive import artifact_spec, derived_probe, initializer_names
from tda_export.runtime.artifact import Artifact
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import bind_call, prefill
from tda_export.runtime.session import Sessions, map_weight, open_session

CHANCE = 1 / 3  # Jaccard overlap of two random halves: 1/4 of neurons is in both, 3/4 in at least one


class Reader:
    """Reads texts with an artifact: relative magnitudes of single tokens, and neuron scores of whole prompts."""

    def __init__(self, artifact: Artifact, provider: str) -> None:
        self.artifact, self.shape = artifact, artifact.shape
        self._sessions = Sessions(artifact, provider)
        model = derived_probe(artifact)
        names = initializer_names(model)
        weights = {name: value for name, value in self._sessions.shared_weights.items() if name in names}
        self._probe = open_session(artifact, model, provider, weights, native=self._sessions.native)
        self._spec = artifact_spec(artifact)

    @property
    def provider(self) -> str:
        return self._sessions.provider

    def relative_magnitudes(self, tokens: Sequence[int], layers: Sequence[int]) -> list[np.ndarray]:
        """Read tokens as one sequence, with every neuron.

        Args:
            tokens: S token ids.
            layers: The numbers of the layers to look at.

        Returns:
            For each of the layers, float32 [S, F].
        """
        cache = KvCache(self.shape, self.provider, len(tokens))
        call = bind_call(self._probe, cache, tokens)
        for layer in layers:
            call.allocate(contract.ffn_input(layer), "cpu")
        outputs = call.run()
        return [self._relative(layer, _float32(outputs[contract.ffn_input(layer)])[0]) for layer in layers]

    def scores(self, tokens: Sequence[int]) -> np.ndarray:
        """Read a prompt as in deployment and return the neuron scores of all layers, float32 [L, F].

        The scores are those of the artifact's method. They include neither the first token nor the artifact's prior,
        which all prompts share.
        """
        cache = KvCache(self.shape, self.provider, len(tokens))
        _, mask = prefill(self._sessions, self.shape, tokens, cache, prior=False)
        weight = max(float(mask.stats[contract.PAST_STATS_WEIGHT].numpy()[0]), 1.0)
        sums = [
            mask.stats[contract.past_neuron_stats(layer)].numpy()[contract.SCORE_ROW]
            for layer in range(self.shape.num_layers)
        ]
        return np.sqrt(np.stack(sums) / np.float32(weight))

    def _relative(self, layer: int, x: np.ndarray) -> np.ndarray:
        """Compute r [S, F] of a layer from the input of its FFN, float32 [S, M]."""

        def product(part: str) -> np.ndarray:
            y = x @ float32_weight(self.artifact, contract.ffn_weight(layer, part)).T  # [S, F]
            return y + float32_weight(self.artifact, contract.ffn_bias(layer, part)) if self._spec.ffn_bias else y

        first, *rest = (product(part) for part in self._spec.ffn_parts[:-1])
        h = activate(self._spec.activation, first)  # [S, F]
        if rest:
            h = h * rest[0]
        down = float32_weight(self.artifact, contract.ffn_weight(layer, "down"))  # [F, M]
        return relative(np.abs(h) * np.linalg.norm(down, axis=1))


def float32_weight(artifact: Artifact, name: str) -> np.ndarray:
    """Read a tensor of weights.bin as float32, in its own shape."""
    array = map_weight(artifact, name)
    if artifact.manifest["weights"][name]["dtype"] == "bfloat16":
        array = (array.astype(np.uint32) << 16).view(np.float32)  # bfloat16 is the upper half of float32
    return array.astype(np.float32, copy=False)


def activate(name: str, x: np.ndarray) -> np.ndarray:
    """Apply an activation function of `DecoderSpec` to float32 of any shape."""
    if name == "relu":
        return np.maximum(x, 0)
    if name == "silu":
        return x / (1 + np.exp(-np.clip(x, -80, None)))
    if name == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "gelu":
        return (0.5 * x * (1 + np.vectorize(math.erf, otypes=[np.float32])(x / math.sqrt(2)))).astype(x.dtype)
    raise ValueError(f"Activation {name!r} is not known.")


def relative(magnitudes: np.ndarray) -> np.ndarray:
    """Divide magnitudes [S, F] by the norm of each row; rows of zeros stay."""
    largest = magnitudes.max(axis=1, keepdims=True)
    scaled = magnitudes / np.where(largest > 0, largest, 1)  # scaled first: squares may leave float32's range
    return scaled / np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), 1)


def top_half(values: np.ndarray) -> np.ndarray:
    """Mark the larger half of each row [.., F]: bool [.., F] with F // 2 true; among equal values the first ones."""
    order = np.argsort(-values, axis=-1, kind="stable")
    marked = np.zeros(values.shape, bool)
    np.put_along_axis(marked, order[..., : values.shape[-1] // 2], True, axis=-1)
    return marked


def jaccard(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the share of neurons in both sets among those in at least one, bool [.., F] each: float [..]."""
    either = (one | other).sum(axis=-1)
    return (one & other).sum(axis=-1) / np.maximum(either, 1)


def cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the cosine similarity over the last axis, float [.., F] each: float [..]."""
    norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    return (one * other).sum(axis=-1) / np.maximum(norms, np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Inertia:
    """How much tokens share their active neurons. All are means over tokens, in [0, 1].

    `cosine` and `jaccard` compare the relative magnitudes and the active halves of adjacent tokens; `kept` is the share
    of the neurons important for the first quarter of the tokens that is active for a later token (chance: 0.5).
    """

    cosine: float
    jaccard: float
    kept: float


def inertia(r: np.ndarray) -> Inertia:
    """Measure the inertia of relative magnitudes, float [T, F], T at least 2."""
    active = top_half(r)
    first = first_quarter(len(r))
    important = top_half(np.sqrt(np.square(r[:first]).mean(axis=0)))
    return Inertia(
        cosine=float(cosine(r[:-1], r[1:]).mean()),
        jaccard=float(jaccard(active[:-1], active[1:]).mean()),
        kept=float(active[first:, important].mean()),
    )


def first_quarter(tokens: int) -> int:
    """Return how many of a sequence's tokens count as its first, at least one."""
    return max(1, tokens // 4)


@dataclass(frozen=True)
class Similarity:
    """Similarity of N prompts, pair by pair and averaged over layers: cosine of scores and Jaccard overlap of important
    neurons, [N, N] each."""

    cosine: np.ndarray
    jaccard: np.ndarray


def similarity(scores: np.ndarray) -> Similarity:
    """Compare the neuron scores of N prompts, float [N, L, F]."""
    important = top_half(scores)
    count = len(scores)
    result = Similarity(np.ones((count, count)), np.ones((count, count)))
    for i, j in itertools.combinations(range(count), 2):
        result.cosine[i, j] = result.cosine[j, i] = cosine(scores[i], scores[j]).mean()
        result.jaccard[i, j] = result.jaccard[j, i] = jaccard(important[i], important[j]).mean()
    return result


def overlap_by_layer(scores: np.ndarray) -> np.ndarray:
    """Compute the Jaccard overlap of the important neurons of every pair of texts: [N, L, F] to float [L, pairs]."""
    important = top_half(scores)
    return np.stack([jaccard(a, b) for a, b in itertools.combinations(important, 2)], axis=1)


def _float32(value: ort.OrtValue) -> np.ndarray:
    """Copy a value to a float32 array; numpy has no bfloat16, which goes through PyTorch."""
    if value.data_type() == "tensor(bfloat16)":
        import torch

        array: np.ndarray = torch.from_dlpack(value).float().cpu().numpy()
    else:
        array = value.numpy().astype(np.float32, copy=False)
    return array
