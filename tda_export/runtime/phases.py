"""The two phases as plain calls: prefill reads a prompt and returns its mask, a decode step appends one token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from tda_export.graph import contract
from tda_export.graph.contract import ModelShape
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.session import Call, Sessions, device_tensor

CHUNK_TOKENS = 2048  # longer prompts are prefilled in pieces of this size


@dataclass(frozen=True)
class PromptMask:
    """What prefill says about a prompt, in the provider's memory.

    `inputs` are decode's by name, `stats` a further prefill's (the running statistics), `kept` the number of neurons
    in the mask over all layers.
    """

    inputs: dict[str, ort.OrtValue]
    stats: dict[str, ort.OrtValue]
    kept: int


def prefill(
    sessions: Sessions,
    shape: ModelShape,
    tokens: list[int],
    cache: KvCache,
    thresholds: np.ndarray | None = None,
    *,
    chunk: int = CHUNK_TOKENS,
) -> tuple[np.ndarray, PromptMask]:
    """Read a prompt, in chunks that carry the running statistics.

    Args:
        sessions: Of the artifact.
        shape: Its sizes.
        tokens: The prompt, at least one token; the cache has room for it.
        cache: Past keys and values; the prompt is appended.
        thresholds: float32 [L] in place of the artifact's own, or None.
        chunk: Tokens of one call at most.

    Returns:
        The last token's logits, float32 [V], and the mask of the whole prompt.
    """
    provider, layers = sessions.provider, range(shape.num_layers)
    stats: dict[str, ort.OrtValue] = {}
    for start in range(0, len(tokens), chunk):
        piece = np.array([tokens[start : start + chunk]], np.int64)  # [1, S]
        cache.reserve(piece.shape[1])
        call = Call(sessions.prefill)
        call.feed(contract.INPUT_IDS, piece)
        call.feed(contract.ATTENTION_MASK, cache.mask)
        cache.bind(call)
        for name, value in stats.items():
            call.feed(name, value)
        if thresholds is not None:
            call.feed(contract.THRESHOLDS, device_tensor(thresholds.astype(np.float32), provider))
        call.allocate(contract.LOGITS, "cpu")
        call.allocate(contract.PRESENT_STATS_WEIGHT, provider)
        for layer in layers:
            call.allocate(contract.present_neuron_stats(layer), provider)
            call.allocate(contract.present_mask_indices(layer), provider)
            call.allocate(contract.present_tail_mean(layer), provider)
        outputs = call.run()
        cache.commit()
        stats = {contract.PAST_STATS_WEIGHT: outputs[contract.PRESENT_STATS_WEIGHT]} | {
            contract.past_neuron_stats(i): outputs[contract.present_neuron_stats(i)] for i in layers
        }
    indices = {contract.mask_indices(i): outputs[contract.present_mask_indices(i)] for i in layers}
    kept = sum(value.shape()[0] for value in indices.values())
    # An empty input is more than some kernels take: one padding index means the same.
    nothing = device_tensor(np.array([contract.PADDING_INDEX], np.int32), provider)
    inputs = {name: value if value.shape()[0] else nothing for name, value in indices.items()} | {
        contract.tail_mean(i): outputs[contract.present_tail_mean(i)] for i in layers
    }
    return outputs[contract.LOGITS].numpy()[0, -1], PromptMask(inputs, stats, kept)


class DecodeStep:
    """Decodes one token at a time with a prompt's mask, or densely with the prefill graph (`mask` None).

    Everything but the token and the attention mask is bound once; a grown cache is bound anew.
    """

    def __init__(self, sessions: Sessions, cache: KvCache, mask: PromptMask | None) -> None:
        self._sessions, self._cache, self._mask = sessions, cache, mask
        self._token = device_tensor(np.zeros((1, 1), np.int64), sessions.provider)
        self._attended = device_tensor(cache.mask, sessions.provider)
        self._call: Call | None = None

    def run(self, token: int) -> np.ndarray:
        """Append `token` to the cache and return the next one's logits, float32 [V]."""
        cache = self._cache
        cache.reserve(1)
        if self._call is None or self._attended.shape()[1] != cache.capacity:
            self._call = self._bind()
        else:
            self._attended.update_inplace(cache.mask)
        self._token.update_inplace(np.array([[token]], np.int64))
        outputs = self._call.run()
        cache.commit()
        return outputs[contract.LOGITS].numpy()[0, -1]

    def _bind(self) -> Call:
        call = Call(self._sessions.prefill if self._mask is None else self._sessions.decode)
        self._attended = device_tensor(self._cache.mask, self._sessions.provider)
        call.feed(contract.INPUT_IDS, self._token)
        call.feed(contract.ATTENTION_MASK, self._attended)
        self._cache.bind(call)
        for name, value in (self._mask.inputs if self._mask else {}).items():
            call.feed(name, value)
        call.allocate(contract.LOGITS, "cpu")
        return call
