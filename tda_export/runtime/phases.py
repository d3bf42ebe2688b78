"""The two phases as plain calls: prefill reads a prompt and returns its mask, decode appends given tokens."""

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
INDEX_TYPE = "tensor(int32)"
CHUNK_TOKENS = 2048  # longer prompts are prefilled in pieces of this size


@dataclass(frozen=True)
class PromptMask:
    """What prefill says about a prompt, in the provider's memory.

    `inputs` are decode's by name (mask indices may be padded with -1), `stats` a further prefill's (the running
    statistics).
    """

    inputs: dict[str, ort.OrtValue]
    stats: dict[str, ort.OrtValue]

    def indices(self, layer: int) -> np.ndarray:
        """Copy the neurons of a layer's mask to the host, int32 [K], without padding."""
        indices: np.ndarray = self.inputs[contract.mask_indices(layer)].numpy()
        return indices[indices != contract.PADDING_INDEX]

    def count(self, layers: int) -> int:
        """Return how many neurons the masks of all layers hold."""
        return sum(len(self.indices(layer)) for layer in range(layers))


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


def decode(
    sessions: Sessions,
    cache: KvCache,
    tokens: Sequence[int],
    mask: PromptMask | None,
    inputs: Mapping[str, ort.OrtValue] = EMPTY,
) -> np.ndarray:
    """Append given tokens with the decode graph, under a mask or with every neuron. Returns logits, float32 [S, V]."""
    call = bind_call(sessions.decode, cache, tokens, {**(mask.inputs if mask else EMPTY), **inputs})
    logits = call.run()[contract.LOGITS]
    cache.commit()
    return logits.numpy()[0]


def prefill(
    sessions: Sessions,
    shape: ModelShape,
    tokens: Sequence[int],
    cache: KvCache,
    thresholds: np.ndarray | None = None,
    *,
    into: Mapping[str, ort.OrtValue] = EMPTY,
    chunk: int = CHUNK_TOKENS,
) -> tuple[np.ndarray, PromptMask]:
    """Read a prompt, in chunks that carry the running statistics.

    Args:
        sessions: Of the artifact.
        shape: Its sizes.
        tokens: The prompt, at least one token; the cache has room for it.
        cache: Past keys and values; the prompt is appended.
        thresholds: float32 [L] in place of the artifact's own, or None.
        into: Memory for masks and tail means, by the names of decode's inputs, as `DecodeStep.fixed_inputs` holds it.
        chunk: Tokens of one call at most.

    Returns:
        The last token's logits, float32 [V], and the mask of the whole prompt.
    """
    provider, layers = sessions.provider, range(shape.num_layers)
    produced = {contract.mask_indices(i): contract.present_mask_indices(i) for i in layers}
    produced |= {contract.tail_mean(i): contract.present_tail_mean(i) for i in layers}
    if not sessions.pads_masks:  # their size is known only once they are chosen
        into = {name: value for name, value in into.items() if value.data_type() != INDEX_TYPE}
    stats: dict[str, ort.OrtValue] = {}
    override: dict[str, ort.OrtValue] = {}
    if thresholds is not None:
        override[contract.THRESHOLDS] = device_tensor(thresholds.astype(np.float32), provider)
    for start in range(0, len(tokens), chunk):
        call = bind_call(sessions.prefill, cache, tokens[start : start + chunk], stats | override)
        call.allocate(contract.PRESENT_STATS_WEIGHT, provider)
        for layer in layers:
            call.allocate(contract.present_neuron_stats(layer), provider)
        for name, output in produced.items():
            if name in into:
                call.write_to(output, into[name])
            else:
                call.allocate(output, provider)
        outputs = call.run()
        cache.commit()
        stats = {contract.PAST_STATS_WEIGHT: outputs[contract.PRESENT_STATS_WEIGHT]} | {
            contract.past_neuron_stats(i): outputs[contract.present_neuron_stats(i)] for i in layers
        }
    # An empty input is more than some kernels take: one padding index means the same.
    nothing = device_tensor(np.array([contract.PADDING_INDEX], np.int32), provider)
    inputs = {name: outputs[output] if outputs[output].shape()[0] else nothing for name, output in produced.items()}
    return outputs[contract.LOGITS].numpy()[0, -1], PromptMask(inputs, stats)
