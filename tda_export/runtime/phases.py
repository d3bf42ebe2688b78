"""The two phases as plain calls: prefill reads a prompt and returns its prompt mask, decode appends given tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from tda_export.graph import contract
from tda_export.graph.contract import ModelShape
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.session import Call, Sessions, device_tensor, empty_tensor

EMPTY: Mapping[str, ort.OrtValue] = {}
INDEX_TYPE = "tensor(int32)"
CHUNK_TOKENS = 2048  # longer prompts are prefilled in pieces of this size


@dataclass(frozen=True)
class PromptMask:
    """What prefill computes about a prompt, in the provider's memory.

    `inputs` are inputs of decode by name (mask indices may be padded with -1). `stats` are inputs of a further prefill
    (the running statistics).
    """

    inputs: dict[str, ort.OrtValue]
    stats: dict[str, ort.OrtValue]

    def indices(self, layer: int) -> np.ndarray:
        """Copy the neuron indices of a layer's mask to the host, int32 [K], without padding."""
        indices: np.ndarray = self.inputs[contract.mask_indices(layer)].numpy()
        return indices[indices != contract.PADDING_INDEX]

    def count(self, layers: int) -> int:
        """Return how many neurons the masks of all layers hold."""
        return sum(len(self.indices(layer)) for layer in range(layers))

    def densities(self, layers: int, ffn_size: int) -> np.ndarray:
        """Return the share of each layer's neurons that the mask holds, float64 [L]."""
        return np.array([len(self.indices(layer)) / ffn_size for layer in range(layers)])

    def without_tail(self) -> PromptMask:
        """Return the same mask without a tail mean for the neurons outside it."""
        indices = {name: value for name, value in self.inputs.items() if value.data_type() == INDEX_TYPE}
        return PromptMask(indices, self.stats)


def bind_call(
    session: ort.InferenceSession, cache: KvCache, tokens: Sequence[int], inputs: Mapping[str, ort.OrtValue] = EMPTY
) -> Call:
    """Bind, but do not run, a call that appends `tokens` to the cache and gives their logits.

    Args:
        session: A session of either graph.
        cache: The KV cache. Room for the tokens is reserved; commit it after the run.
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


def decode(
    sessions: Sessions,
    cache: KvCache,
    tokens: Sequence[int],
    mask: PromptMask | None,
    inputs: Mapping[str, ort.OrtValue] = EMPTY,
) -> np.ndarray:
    """Append given tokens with the decode graph, under a prompt mask or with every neuron.

    Args:
        sessions: Of the artifact.
        cache: Holds the earlier tokens; the new ones are appended.
        tokens: S token ids.
        mask: The prompt mask; None decodes densely.
        inputs: Further inputs by name. With a prompt mask, token thresholds are the artifact's own unless given here.

    Returns:
        Logits, float32 [S, V].
    """
    call = bind_call(sessions.decode, cache, tokens, {**(mask.inputs if mask else sessions.dense_inputs), **inputs})
    logits = call.run()[contract.LOGITS]
    cache.commit()
    return logits.numpy()[0]


class Prefill:
    """Reads prompts into one cache. All inputs except the tokens are bound once.

    The running statistics lie in their own buffers, which each call updates in place: the first call of a prompt
    begins with the artifact's prior or with zero; later calls add to them.
    """

    def __init__(
        self, sessions: Sessions, shape: ModelShape, cache: KvCache, into: Mapping[str, ort.OrtValue] = EMPTY
    ) -> None:
        """Bind the prefill graph.

        Args:
            sessions: Of the artifact.
            shape: The artifact's sizes.
            cache: Past keys and values; prompts are appended.
            into: Memory for prompt masks and tail means, by the names of decode's inputs (`DecodeStep.fixed_inputs`).
        """
        provider, layers = sessions.provider, range(shape.num_layers)
        self._sessions, self._cache = sessions, cache
        self._logits = empty_tensor((1, 1, shape.vocab_size), "float32", "cpu")
        self._decay = device_tensor(np.zeros(1, np.float32), provider)
        self._thresholds = empty_tensor((shape.num_layers,), "float32", provider)
        self._stats = {contract.PAST_STATS_WEIGHT: empty_tensor((1,), "float32", provider)} | {
            contract.past_neuron_stats(i): empty_tensor((2, shape.ffn_size), "float32", provider) for i in layers
        }
        produced = {contract.mask_indices(i): contract.present_mask_indices(i) for i in layers}
        produced |= {contract.tail_mean(i): contract.present_tail_mean(i) for i in layers}
        if not sessions.pads_masks:  # the size of masks is known only once they are chosen
            into = {name: value for name, value in into.items() if value.data_type() != INDEX_TYPE}
        self._into = {name: into[name] for name in produced if name in into}
        self._allocated = {name: output for name, output in produced.items() if name not in into}
        self._written = {produced[name]: value for name, value in self._into.items()}
        self._written |= {contract.PRESENT_STATS_WEIGHT: self._stats[contract.PAST_STATS_WEIGHT]}
        for layer in layers:
            self._written[contract.present_neuron_stats(layer)] = self._stats[contract.past_neuron_stats(layer)]
        self._spoiled = False  # whether the statistics hold non-finite numbers, which no decay clears
        self._calls: dict[tuple[bool, bool], Call] = {}  # by whether thresholds and past statistics are given
        # Some kernels refuse an empty input: one padding index means the same.
        self._nothing = device_tensor(np.array([contract.PADDING_INDEX], np.int32), provider)

    def _bound(self, given: bool, past: bool) -> Call:
        if (given, past) not in self._calls:
            call = self._calls[given, past] = Call(self._sessions.prefill)
            self._cache.bind(call)
            call.feed(contract.STATS_DECAY, self._decay)
            call.write_to(contract.LOGITS, self._logits)
            if past:  # otherwise the defaults apply, which are the prior
                for name, value in self._stats.items():
                    call.feed(name, value)
            for name, value in self._written.items():
                call.write_to(name, value)
            if given:
                call.feed(contract.THRESHOLDS, self._thresholds)
        return self._calls[given, past]

    def statistics(self) -> dict[str, np.ndarray]:
        """Copy the running statistics to the host: the sums over the tokens read so far, and the prior."""
        return {name: value.numpy().copy() for name, value in self._stats.items()}

    def restore(self, statistics: Mapping[str, np.ndarray]) -> None:
        """Restore the result of `statistics()`; a `read` with a decay continues from it."""
        for name, value in self._stats.items():
            value.update_inplace(statistics[name])
        self._spoiled = False

    def read(
        self,
        tokens: Sequence[int],
        thresholds: np.ndarray | None = None,
        *,
        prior: bool = True,
        decay: float | None = None,
        chunk: int = CHUNK_TOKENS,
    ) -> tuple[np.ndarray, PromptMask]:
        """Append a prompt to the cache, in chunks that carry the running statistics.

        Args:
            tokens: The prompt, at least one token; the cache has room for it.
            thresholds: float32 [L] instead of the artifact's own, or None.
            prior: Begin the statistics with the artifact's prior (with zero where it has none).
            decay: Continue with the statistics of the last call, times this factor, instead of beginning anew.
            chunk: The most tokens of one call.

        Returns:
            The last token's logits, float32 [V], and the prompt mask of the whole prompt. The next prompt overwrites
            the parts of the mask in this object's memory: its statistics, and all that `into` holds.
        """
        if thresholds is not None:
            self._thresholds.update_inplace(np.asarray(thresholds, np.float32))
        given = thresholds is not None
        call = self._bound(given, past=decay is not None or not prior)
        if self._spoiled:
            for value in self._stats.values():
                value.update_inplace(np.zeros(value.shape(), np.float32))
        outputs: Mapping[str, ort.OrtValue] = EMPTY
        first = decay if decay is not None else float(prior)
        for start in range(0, len(tokens), chunk):
            piece = tokens[start : start + chunk]
            if start:
                call = self._bound(given, past=True)
            self._cache.reserve(len(piece))
            call.feed(contract.INPUT_IDS, np.array([list(piece)], np.int64))
            call.feed(contract.ATTENTION_MASK, self._cache.mask)
            self._decay.update_inplace(np.array([1.0 if start else first], np.float32))
            for output in self._allocated.values():  # allocated anew: their sizes differ from call to call
                call.allocate(output, self._sessions.provider)
            if self._allocated:
                outputs = call.run()
            else:
                call.run_only()
            self._cache.commit()
        allocated = {name: outputs[output] for name, output in self._allocated.items()}
        inputs = {name: value if value.shape()[0] else self._nothing for name, value in allocated.items()}
        logits = self._logits.numpy()[0, 0].copy()
        self._spoiled = not bool(np.isfinite(logits).all())
        return logits, PromptMask(self._into | inputs, self._stats)


def prefill(
    sessions: Sessions,
    shape: ModelShape,
    tokens: Sequence[int],
    cache: KvCache,
    thresholds: np.ndarray | None = None,
    *,
    prior: bool = True,
    chunk: int = CHUNK_TOKENS,
) -> tuple[np.ndarray, PromptMask]:
    """Read one prompt into a cache (see `Prefill`)."""
    return Prefill(sessions, shape, cache).read(tokens, thresholds, prior=prior, chunk=chunk)
