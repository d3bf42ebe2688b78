"""Compare the graphs of artifacts with prompt masks with transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from tda_export.calibration.file import read_calibration
from tda_export.graph import contract
from tda_export.graph.comparison import RELATIVE, SECOND_LEVEL_FACTOR, Comparison, to_host
from tda_export.graph.method import kept_neurons
from tda_export.graph.prefill import calibrated_prior
from tda_export.graph.reference import SecondLevel, reference_logits, reference_scores, reference_tails
from tda_export.runtime.decode_step import DecodeStep
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import EMPTY, PromptMask, decode, prefill
from tda_export.runtime.session import device_tensor, map_weight

CHUNK = 7  # tokens of a chunk in the chunked-prefill check
TINY = 1e-30  # guards a division by a threshold of zero


class IndexedComparison(Comparison):
    """Compares an artifact with prompt masks: prefill, scores and selected mask, decode under masks, thresholds,
    chunks."""

    def _compare(self, prompt: list[int], continuation: list[int]) -> None:
        logits = self._all_prompt_logits(prompt)
        dense, dense_continuation = reference_logits(self.reference, self.spec, prompt, continuation)
        half = reference_logits(self.rounded, self.spec, prompt, continuation) if self.rounded else (None, None)
        self._logits("prefill logits", logits, dense, half[0])

        step = DecodeStep(self.sessions, self.shape, len(prompt) + len(continuation))
        step.capture()
        cache = step.cache
        _, mask = step.read(prompt, prior=False)  # transformers has no prior
        self._scores(prompt, mask)
        self.advance(1)

        start = cache.length
        masks, tails = self._deployed_mask(mask)
        if self.artifact.manifest["method"].get("tail") == "mean":
            references = reference_tails(self.reference, self.spec, prompt, masks)
            # The mean of few small neurons is small beside the mean of the other neurons, to which it is added.
            whole = reference_tails(self.reference, self.spec, prompt, [torch.zeros_like(mask) for mask in masks])
            for tail, reference, output in zip(tails, references, whole, strict=True):
                self._relative("tail mean", tail.numpy(), reference.numpy(), float(output.abs().max()))
        masked = self._decode(continuation, cache, mask)
        _, expected = reference_logits(self.reference, self.spec, prompt, continuation, masks, tails)
        half_masked = (
            reference_logits(self.rounded, self.spec, prompt, continuation, masks, tails)[1] if self.rounded else None
        )
        self._logits("decode with the prompt's mask", masked, expected, half_masked)
        cache.truncate(start)
        step.use(mask)
        one_by_one = np.stack([step.logits(token) for token in continuation])
        self._logits("decode token by token", one_by_one, expected, half_masked)
        if self.artifact.manifest["method"]["two_levels"]:
            cache.truncate(start)
            self._second_level(prompt, continuation, cache, mask, (masks, tails))
        self.advance(1)

        cache.truncate(start)
        self._chunked(prompt, cache, mask)
        step.use(None)  # overwrites the mask's memory, so it comes after everything with the mask
        cache.truncate(start)
        every = self._decode(continuation, cache, None)
        self._logits("decode with all neurons", every, dense_continuation, half[1])
        self._halved(prompt, continuation, cache, start)
        if self.artifact.manifest["prior_tokens"]:
            self._prior(prompt, mask)
        self.advance(1)

    def _second_level(
        self,
        prompt: list[int],
        continuation: list[int],
        cache: KvCache,
        mask: PromptMask,
        masking: tuple[list[torch.Tensor], list[torch.Tensor]],
    ) -> None:
        """Decode under the prompt mask and a token threshold that about half of the neurons reach."""
        layers = range(self.shape.num_layers)
        scales = [torch.from_numpy(map_weight(self.artifact, contract.neuron_scale(i)).copy()) for i in layers]
        level = SecondLevel(scales, [])
        _, expected = reference_logits(self.reference, self.spec, prompt, continuation, *masking, level)
        half = None
        if self.rounded:
            half = reference_logits(self.rounded, self.spec, prompt, continuation, *masking, level)[1]
        thresholds = device_tensor(np.array(level.thresholds, np.float32), self.provider)
        skipping = self._decode(continuation, cache, mask, {contract.TOKEN_THRESHOLDS: thresholds})
        self._logits("decode with token thresholds", skipping, expected, half, SECOND_LEVEL_FACTOR)

    def _halved(self, prompt: list[int], continuation: list[int], cache: KvCache, start: int) -> None:
        """Decode with every second neuron and padding, whatever the artifact's prompt mask is."""
        kept = torch.zeros(self.shape.ffn_size)
        kept[::2] = 1
        padded = np.append(np.arange(0, self.shape.ffn_size, 2), [contract.PADDING_INDEX] * 3).astype(np.int32)
        indices = device_tensor(padded, self.provider)
        layers = range(self.shape.num_layers)
        mask = PromptMask({contract.mask_indices(i): indices for i in layers}, {})
        masks, tails = [kept] * len(layers), [torch.zeros(self.shape.hidden_size)] * len(layers)
        cache.truncate(start)
        halved = self._decode(continuation, cache, mask)
        _, expected = reference_logits(self.reference, self.spec, prompt, continuation, masks, tails)
        half = (
            reference_logits(self.rounded, self.spec, prompt, continuation, masks, tails)[1] if self.rounded else None
        )
        self._logits("decode with every second neuron", halved, expected, half)

    def _chunked(self, prompt: list[int], cache: KvCache, mask: PromptMask) -> None:
        pieces = KvCache(self.shape, self.provider, len(prompt))
        _, chunked = prefill(self.sessions, self.shape, prompt, pieces, prior=False, chunk=CHUNK)
        self._same_cache("keys and values after chunked prefill", pieces, cache)
        for layer in range(self.shape.num_layers):
            scores, kept = _scores_of(mask, layer), _indices_of(mask, layer)
            border = min((float(scores[i]) for i in kept), default=float(scores.max()))
            self._same_mask("mask after chunked prefill", _indices_of(chunked, layer), kept, scores, border)

    def _prior(self, prompt: list[int], mask: PromptMask) -> None:
        """Compare the default initial statistics with the calibration that the artifact carries."""
        calibration = read_calibration(self.artifact.file(contract.CALIBRATION_FILE))
        prior = calibrated_prior(calibration.sums, self.artifact.manifest["prior_tokens"])
        cache = KvCache(self.shape, self.provider, len(prompt))
        stats = [mask.stats[contract.past_neuron_stats(i)].numpy() for i in range(self.shape.num_layers)]
        _, blended = prefill(self.sessions, self.shape, prompt, cache)
        for layer, own in enumerate(stats):
            found = blended.stats[contract.past_neuron_stats(layer)].numpy()
            self._relative("statistics with the prior", found, own + prior.stats[layer])

    def _decode(
        self,
        continuation: list[int],
        cache: KvCache,
        mask: PromptMask | None,
        inputs: Mapping[str, ort.OrtValue] = EMPTY,
    ) -> np.ndarray:
        """Decode the continuation: its first token alone (S = 1), the others in one call. Returns [C, V].

        Without thresholds among `inputs` no neuron of the mask is skipped.
        """
        inputs = {**self.sessions.dense_inputs, **inputs}
        pieces = [piece for piece in (continuation[:1], continuation[1:]) if piece]
        return np.concatenate([decode(self.sessions, cache, piece, mask, inputs) for piece in pieces])

    def _deployed_mask(self, mask: PromptMask) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        masks, tails = [], []
        for layer in range(self.shape.num_layers):
            kept = torch.zeros(self.shape.ffn_size)
            kept[sorted(_indices_of(mask, layer))] = 1
            masks.append(kept)
            tails.append(torch.from_numpy(to_host(mask.inputs[contract.tail_mean(layer)])))
        return masks, tails

    def _scores(self, prompt: list[int], mask: PromptMask) -> None:
        """Compare scores with transformers', and the mask with the selection that the manifest describes."""
        method, thresholds = self.artifact.manifest["method"], self.artifact.manifest["thresholds"]
        expected = reference_scores(self.reference, self.spec, prompt, magnitude=method["statistic"] == "magnitude")
        for layer, tensor in enumerate(expected):
            scores = tensor.numpy()
            self._relative("neuron scores", _scores_of(mask, layer), scores)
            if method["selection"] == "threshold":
                border = thresholds[layer]
            else:
                kept = kept_neurons(method["density"], self.shape.ffn_size)
                border = float(np.sort(scores)[-kept])
            selected = set(np.flatnonzero(scores >= border).tolist())
            self._same_mask("selection of the mask", selected, _indices_of(mask, layer), scores, border)

    def _same_mask(self, name: str, one: set[int], other: set[int], scores: np.ndarray, border: float) -> None:
        """Check that masks differ only in neurons whose scores are at the mask's border, within rounding."""
        distances = [abs(float(scores[i]) - border) / max(border, TINY) for i in one ^ other]
        self._add(name, max(distances, default=0.0), RELATIVE[self.shape.precision])


def _scores_of(mask: PromptMask, layer: int) -> np.ndarray:
    stats: Any = mask.stats[contract.past_neuron_stats(layer)].numpy()
    return np.sqrt(stats[contract.SCORE_ROW] / mask.stats[contract.PAST_STATS_WEIGHT].numpy())


def _indices_of(mask: PromptMask, layer: int) -> set[int]:
    return set(mask.indices(layer).tolist())
