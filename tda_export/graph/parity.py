"""Compare an artifact's graphs with transformers, and keep the largest differences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from tda_export.calibration.file import read_calibration
from tda_export.graph import contract
from tda_export.graph.method import kept_neurons
from tda_export.graph.prefill import calibrated_prior
from tda_export.graph.reference import SecondLevel, reference_logits, reference_scores, reference_tails
from tda_export.models.source import ModelSource
from tda_export.models.spec import DecoderSpec
from tda_export.progress import Advance
from tda_export.runtime.artifact import Artifact
from tda_export.runtime.decode_step import DecodeStep
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import EMPTY, PromptMask, bind_call, decode, prefill
from tda_export.runtime.providers import CUDA
from tda_export.runtime.session import Sessions, device_tensor, map_weight
from tda_export.runtime.text import Text

PROMPTS = (
    "The lighthouse keeper wrote down the height of every tide for forty years. When the harbour was dredged, the "
    "engineers asked for his notebooks, because no instrument had watched the water for half as long.",
    "def mean(values):\n    # The sum over the count; an empty list has no mean.\n    if not values:\n"
    "        raise ValueError('no values')\n    return sum(values) / len(values)\n",
)
CONTINUATION_TOKENS = 8
FEWEST_TOKENS = 3 * CONTINUATION_TOKENS  # of a prompt and its continuation
FEWEST_PROMPT_TOKENS = 2  # the first never counts
CHUNK = 7  # tokens of a chunk in the chunked-prefill check
FLOAT32_LOGITS = 2e-3  # largest absolute difference of float32 logits
HALF_FACTOR = 2.0  # half precision may be this many times as far from float32 as transformers in the same dtype
SECOND_LEVEL_FACTOR = 5.0  # the same where rounding decides which neurons near a threshold are skipped
RELATIVE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}  # scores, keys and values, relative to the largest
TINY = 1e-30  # guards a division by a threshold of zero


@dataclass(frozen=True)
class Check:
    """One comparison: its largest difference over all prompts, and what is allowed; file checks have a `problem`."""

    name: str
    difference: float | None = None
    allowed: float | None = None
    problem: str | None = None

    @property
    def passed(self) -> bool:
        if self.problem is not None:
            return False
        # Not '>': a NaN must fail.
        return self.difference is None or self.allowed is None or self.difference <= self.allowed


@dataclass
class Worst:
    """The comparison of one check that is worst relative to what it is allowed; anything not finite is worse."""

    difference: float = 0.0
    allowed: float = 0.0
    excess: float = -1.0

    def add(self, difference: float, allowed: float) -> None:
        if not math.isfinite(allowed):
            difference = math.nan  # no allowance, no pass: the reference itself overflowed
        if math.isnan(difference) or (difference > 0 and not allowed):
            excess = math.inf
        else:
            excess = difference / allowed if difference else 0.0
        if excess > self.excess:
            self.difference, self.allowed, self.excess = difference, allowed, excess


class Comparison:
    """The artifact's graphs beside transformers in float32 (and, for half precision, in the artifact's dtype too)."""

    def __init__(self, artifact: Artifact, source: ModelSource, provider: str, advance: Advance) -> None:
        self.artifact, self.shape, self.advance = artifact, artifact.shape, advance
        self.spec: DecoderSpec = source.spec
        device = "cuda" if provider == CUDA and torch.cuda.is_available() else "cpu"
        self.reference = source.reference(device=device)
        half = self.shape.dtype if self.shape.dtype != "float32" else None
        self.half = source.reference(dtype=getattr(torch, half), device=device) if half else None
        self.sessions = Sessions(artifact, provider)
        self.provider = provider
        self.worst: dict[str, Worst] = {}
        advance(1)

    def run(self) -> list[Check]:
        """Compare on every prompt and return the largest differences."""
        text = Text(self.artifact)
        for prompt in PROMPTS:
            tokens = enough_tokens(text.encode(prompt), self.shape.vocab_size)[: self.shape.max_positions]
            split = max(len(tokens) - CONTINUATION_TOKENS, len(tokens) // 2, FEWEST_PROMPT_TOKENS)
            self._compare(tokens[:split], tokens[split:])
        return [Check(name, worst.difference, worst.allowed) for name, worst in self.worst.items()]

    def _compare(self, prompt: list[int], continuation: list[int]) -> None:
        logits = self._all_prompt_logits(prompt)
        dense, dense_continuation = reference_logits(self.reference, self.spec, prompt, continuation)
        half = reference_logits(self.half, self.spec, prompt, continuation) if self.half else (None, None)
        self._logits("prefill logits", logits, dense, half[0])

        step = DecodeStep(self.sessions, self.shape, len(prompt) + len(continuation))
        step.capture()
        cache = step.cache
        _, mask = step.read(prompt, prior=False)  # transformers knows no prior
        self._scores(prompt, mask)
        self.advance(1)

        start = cache.length
        masks, tails = self._deployed_mask(mask)
        if self.artifact.manifest["method"].get("tail") == "mean":
            references = reference_tails(self.reference, self.spec, prompt, masks)
            # The mean of few small neurons is small beside what it is added to, the mean of the others.
            whole = reference_tails(self.reference, self.spec, prompt, [torch.zeros_like(mask) for mask in masks])
            for tail, reference, output in zip(tails, references, whole, strict=True):
                self._relative("tail mean", tail.numpy(), reference.numpy(), float(output.abs().max()))
        masked = self._decode(continuation, cache, mask)
        _, expected = reference_logits(self.reference, self.spec, prompt, continuation, masks, tails)
        half_masked = (
            reference_logits(self.half, self.spec, prompt, continuation, masks, tails)[1] if self.half else None
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
        step.use(None)  # writes over the mask's memory, so it comes after everything with the mask
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
        """Decode under the prompt's mask and a token threshold that about half of the neurons reach."""
        layers = range(self.shape.num_layers)
        scales = [torch.from_numpy(map_weight(self.artifact, contract.neuron_scale(i)).copy()) for i in layers]
        level = SecondLevel(scales, [])
        _, expected = reference_logits(self.reference, self.spec, prompt, continuation, *masking, level)
        half = None
        if self.half:
            half = reference_logits(self.half, self.spec, prompt, continuation, *masking, level)[1]
        thresholds = device_tensor(np.array(level.thresholds, np.float32), self.provider)
        skipping = self._decode(continuation, cache, mask, {contract.TOKEN_THRESHOLDS: thresholds})
        self._logits("decode with token thresholds", skipping, expected, half, SECOND_LEVEL_FACTOR)

    def _halved(self, prompt: list[int], continuation: list[int], cache: KvCache, start: int) -> None:
        """Decode with every second neuron and padding, whatever the artifact's own mask is."""
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
        half = reference_logits(self.half, self.spec, prompt, continuation, masks, tails)[1] if self.half else None
        self._logits("decode with every second neuron", halved, expected, half)

    def _chunked(self, prompt: list[int], cache: KvCache, mask: PromptMask) -> None:
        pieces = KvCache(self.shape, self.provider, len(prompt))
        _, chunked = prefill(self.sessions, self.shape, prompt, pieces, prior=False, chunk=CHUNK)
        for layer in range(self.shape.num_layers):
            for whole, parts in zip(cache.keys_and_values(layer), pieces.keys_and_values(layer), strict=True):
                rows = slice(0, cache.length)
                self._relative(
                    "keys and values after chunked prefill", to_host(parts)[:, :, rows], to_host(whole)[:, :, rows]
                )
            scores, kept = _scores_of(mask, layer), _indices_of(mask, layer)
            border = min((float(scores[i]) for i in kept), default=float(scores.max()))
            self._same_mask("mask after chunked prefill", _indices_of(chunked, layer), kept, scores, border)

    def _prior(self, prompt: list[int], mask: PromptMask) -> None:
        """Compare what the statistics begin with by default with the calibration that the artifact carries."""
        calibration = read_calibration(self.artifact.file(contract.CALIBRATION_FILE))
        prior = calibrated_prior(calibration.sums, self.artifact.manifest["prior_tokens"])
        cache = KvCache(self.shape, self.provider, len(prompt))
        stats = [mask.stats[contract.past_neuron_stats(i)].numpy() for i in range(self.shape.num_layers)]
        _, blended = prefill(self.sessions, self.shape, prompt, cache)
        for layer, own in enumerate(stats):
            found = blended.stats[contract.past_neuron_stats(layer)].numpy()
            self._relative("statistics with the prior", found, own + prior.stats[layer])

    def _all_prompt_logits(self, prompt: list[int]) -> np.ndarray:
        cache = KvCache(self.shape, self.provider, len(prompt))
        every = {contract.NUM_LOGITS: device_tensor(np.zeros(1, np.int64), "cpu")}
        return bind_call(self.sessions.prefill, cache, prompt, every).run()[contract.LOGITS].numpy()[0]  # [P, V]

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
        """Masks may differ only in neurons whose scores stand at the border of the mask, within rounding."""
        distances = [abs(float(scores[i]) - border) / max(border, TINY) for i in one ^ other]
        self._add(name, max(distances, default=0.0), RELATIVE[self.shape.dtype])

    def _logits(
        self,
        name: str,
        ours: np.ndarray,
        expected: torch.Tensor,
        half: torch.Tensor | None,
        factor: float = HALF_FACTOR,
    ) -> None:
        allowed = FLOAT32_LOGITS if half is None else factor * float((half - expected).abs().max())
        self._add(name, float(np.abs(ours - expected.numpy()).max()), allowed)

    def _relative(self, name: str, ours: np.ndarray, expected: np.ndarray, scale: float | None = None) -> None:
        """Compare relative to the largest expected number, or to `scale`."""
        scale = scale or float(np.abs(expected).max()) or 1.0
        self._add(name, float(np.abs(ours.astype(np.float32) - expected).max()) / scale, RELATIVE[self.shape.dtype])

    def _add(self, name: str, difference: float, allowed: float) -> None:
        self.worst.setdefault(name, Worst()).add(float(difference), float(allowed))


def enough_tokens(tokens: list[int], vocab_size: int) -> list[int]:
    """Return the tokens, followed by random ones where a tokenizer makes too few of a prompt to compare anything."""
    missing = FEWEST_TOKENS - len(tokens)
    if missing <= 0:
        return tokens
    return [*tokens, *np.random.default_rng(0).integers(vocab_size, size=missing).tolist()]


def _scores_of(mask: PromptMask, layer: int) -> np.ndarray:
    stats: Any = mask.stats[contract.past_neuron_stats(layer)].numpy()
    return np.sqrt(stats[contract.SCORE_ROW] / mask.stats[contract.PAST_STATS_WEIGHT].numpy())


def _indices_of(mask: PromptMask, layer: int) -> set[int]:
    return set(mask.indices(layer).tolist())


def to_host(value: ort.OrtValue) -> np.ndarray:
    """Copy a value of any dtype and device to the host as float32."""
    tensor: torch.Tensor = torch.from_dlpack(value)
    return tensor.float().cpu().numpy().copy()
