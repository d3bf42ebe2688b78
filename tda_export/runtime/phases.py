"""The two phases as plain calls: prefill reads a prompt and returns its mask, a decode step appends one token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from tda_export.graph import contract
from tda_export.graph.contract import ModelShape
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.session import Call, Sessions, device_tensor

EMPTY: Mapping[str, ort.OrtValue] = {}
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


def bind_call(
    session: ort.InferenceSession, cache: KvCache, tokens: Sequence[int], inputs: Mapping[str, ort.OrtValue] = EMPTY
) -> Call:
    """Bind a call that appends `tokens` to the cache and gives their logits; it is not run yet.

    Args:
        session: Of either graph.
        cache: Room for the tokens is reserved; commit it after the run.
        tokens: S token ids.
        inputs: Further inputs by name.
    """
    cache.reserve(len(tokens))
    call = Call(session)
    call.feed(contract.INPUT_IDS, np.array([list(tokens)], np.int64))
    call.feed(contract.ATTENTION_MASK, cache.mask)
    cache.bind(call)
    for name, value in inputs.items():
        call.feed(name, value)
    call.allocate(contract.LOGITS, "cpu")
    return call


def decode(sessions: Sessions, cache: KvCache, tokens: Sequence[int], mask: PromptMask | None) -> np.ndarray:
    """Append given tokens with the decode graph, under a mask or with every neuron. Returns logits, float32 [S, V]."""
    logits = bind_call(sessions.decode, cache, tokens, mask.inputs if mask else EMPTY).run()[contract.LOGITS]
    cache.commit()
    return logits.numpy()[0]


def prefill(
    sessions: Sessions,
    shape: ModelShape,
    tokens: Sequence[int],
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
    override: dict[str, ort.OrtValue] = {}
    if thresholds is not None:
        override[contract.THRESHOLDS] = device_tensor(thresholds.astype(np.float32), provider)
    for start in range(0, len(tokens), chunk):
        call = bind_call(sessions.prefill, cache, tokens[start : start + chunk], stats | override)
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
        return outputs[contract.LOGITS].numpy()[0, -1].copy()  # the next run writes to the same memory

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
