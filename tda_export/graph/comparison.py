"""The common parts of comparisons of graphs with transformers: prompts, tolerances, and the largest differences."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
import torch

from tda_export.graph import contract
from tda_export.graph.stored_cache import with_stored_cache
from tda_export.graph.stored_integers import with_stored_integers
from tda_export.models.source import ModelSource
from tda_export.models.spec import DecoderSpec
from tda_export.progress import Advance
from tda_export.runtime.artifact import Artifact
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import bind_call
from tda_export.runtime.providers import CUDA
from tda_export.runtime.session import Sessions, device_tensor
from tda_export.runtime.text import Text

PROMPTS = (
    "The lighthouse keeper wrote down the height of every tide for forty years. When the harbour was dredged, the "
    "engineers asked for his notebooks, because no instrument had watched the water for half as long.",
    "def mean(values):\n    # The sum over the count; an empty list has no mean.\n    if not values:\n"
    "        raise ValueError('no values')\n    return sum(values) / len(values)\n",
)
CONTINUATION_TOKENS = 8
FEWEST_TOKENS = 3 * CONTINUATION_TOKENS  # of a prompt and its continuation
FEWEST_PROMPT_TOKENS = 2  # the first token never counts
FLOAT32_LOGITS = 2e-3  # largest absolute difference of float32 logits
# Half precision, or a cache of codes or float16, may be this many times as far from float32 as transformers with them.
ROUNDED_FACTOR = 2.0
SECOND_LEVEL_FACTOR = 10.0  # the same factor where rounding decides which neurons near a threshold are skipped
# Tolerances of scores, keys and values relative to the largest, by dtype or by format of keys and values.
RELATIVE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1, "float16 cache": 3e-3, "int8 cache": 5e-2}


@dataclass(frozen=True)
class Check:
    """One comparison: its largest difference over all prompts, and the allowed difference; file checks have a
    `problem`."""

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
    """The worst comparison of one check relative to the allowed difference; anything not finite is worse."""

    difference: float = 0.0
    allowed: float = 0.0
    excess: float = -1.0

    def add(self, difference: float, allowed: float) -> None:
        if not math.isfinite(allowed):
            difference = math.nan  # without an allowed difference the check fails: the reference itself overflowed
        if math.isnan(difference) or (difference > 0 and not allowed):
            excess = math.inf
        else:
            excess = difference / allowed if difference else 0.0
        if excess > self.excess:
            self.difference, self.allowed, self.excess = difference, allowed, excess


class Comparison(ABC):
    """Compares the artifact's graphs with transformers in float32.

    Half precision, and keys and values in a format of their own, are compared with `rounded` too: transformers in the
    artifact's dtype, which stores keys and values as the artifact does. Logits may be a few times as far from float32
    as those of `rounded`. With codes no closer agreement can be required: rounding decides between neighbouring codes,
    and each changed code changes all layers after it.
    """

    def __init__(self, artifact: Artifact, source: ModelSource, provider: str, advance: Advance) -> None:
        self.artifact, self.shape, self.advance = artifact, artifact.shape, advance
        self.spec: DecoderSpec = source.spec
        device = "cuda" if provider == CUDA and torch.cuda.is_available() else "cpu"
        self.reference = with_stored_integers(source.reference(device=device), artifact, source)
        self.rounded = None
        if self.shape.precision != "float32":
            rounded = source.reference(dtype=getattr(torch, self.shape.dtype), device=device)
            rounded = with_stored_integers(rounded, artifact, source)
            self.rounded = with_stored_cache(rounded, self.spec, self.shape.kv)
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

    @abstractmethod
    def _compare(self, prompt: list[int], continuation: list[int]) -> None:
        """Compare on one prompt; calls `advance` for three steps."""

    def _all_prompt_logits(self, prompt: list[int]) -> np.ndarray:
        cache = KvCache(self.shape, self.provider, len(prompt))
        every = {contract.NUM_LOGITS: device_tensor(np.zeros(1, np.int64), "cpu")}
        return bind_call(self.sessions.prefill, cache, prompt, every).run()[contract.LOGITS].numpy()[0]  # [P, V]

    def _logits(
        self,
        name: str,
        ours: np.ndarray,
        expected: torch.Tensor,
        half: torch.Tensor | None,
        factor: float = ROUNDED_FACTOR,
    ) -> None:
        rounding = 0.0 if half is None else factor * float((half - expected).abs().max())
        allowed = max(rounding, FLOAT32_LOGITS) if self.shape.dtype == "float32" else rounding
        self._add(name, float(np.abs(ours - expected.numpy()).max()), allowed)

    def _relative(
        self,
        name: str,
        ours: np.ndarray,
        expected: np.ndarray,
        scale: float | None = None,
    ) -> None:
        """Compare relative to the largest expected magnitude, or to `scale`."""
        scale = scale or float(np.abs(expected).max()) or 1.0
        self._add(name, float(np.abs(ours.astype(np.float32) - expected).max()) / scale, RELATIVE[self.shape.precision])

    def _same_cache(self, name: str, one: KvCache, other: KvCache) -> None:
        """Compare the keys and values of two caches of the same tokens."""
        for layer in range(self.shape.num_layers):
            for found, expected in zip(_held(one, layer), _held(other, layer), strict=True):
                self._relative(name, found, expected)

    def _add(self, name: str, difference: float, allowed: float) -> None:
        self.worst.setdefault(name, Worst()).add(float(difference), float(allowed))


def _held(cache: KvCache, layer: int) -> list[np.ndarray]:
    """Return a layer's keys and values as floats, [1, KV, T, D] each; 8-bit keys as stored (times the Hadamard
    matrix)."""
    key, value, *scales = (to_host(buffer)[:, :, : cache.length] for buffer in cache.keys_and_values(layer))
    if scales:
        key, value = (codes * scale[..., None] for codes, scale in zip((key, value), scales, strict=True))
    return [key, value]


def to_host(value: ort.OrtValue) -> np.ndarray:
    """Copy a value of any dtype and device to the host as float32."""
    tensor: torch.Tensor = torch.from_dlpack(value)
    return tensor.float().cpu().numpy().copy()


def enough_tokens(tokens: list[int], vocab_size: int) -> list[int]:
    """Return the tokens, followed by random ones where the tokenizer makes too few of a prompt for a comparison."""
    missing = FEWEST_TOKENS - len(tokens)
    if missing <= 0:
        return tokens
    return [*tokens, *np.random.default_rng(0).integers(vocab_size, size=missing).tolist()]
