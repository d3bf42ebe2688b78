"""Verify an artifact: its files, its graphs, and its numbers against transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from tda_export.errors import TdaError
from tda_export.files import sha256
from tda_export.graph import contract
from tda_export.graph.reference import reference_logits, reference_scores
from tda_export.models.source import ModelSource
from tda_export.models.spec import DecoderSpec
from tda_export.progress import Advance, progress
from tda_export.runtime.artifact import Artifact, open_artifact
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import PromptMask, prefill
from tda_export.runtime.providers import CUDA, choose_provider
from tda_export.runtime.session import Call, Sessions, device_tensor
from tda_export.runtime.text import Text

PROMPTS = (
    "The lighthouse keeper wrote down the height of every tide for forty years. When the harbour was dredged, the "
    "engineers asked for his notebooks, because no instrument had watched the water for half as long.",
    "def mean(values):\n    # The sum over the count; an empty list has no mean.\n    if not values:\n"
    "        raise ValueError('no values')\n    return sum(values) / len(values)\n",
)
CONTINUATION_TOKENS = 8
CHUNK = 7  # tokens of a chunk in the chunked-prefill check
FLOAT32_LOGITS = 2e-3  # largest absolute difference of float32 logits
HALF_FACTOR = 2.0  # float16 may be this many times as far from float32 as transformers' own float16
RELATIVE = {"float32": 1e-3, "float16": 2e-2}  # scores, keys and values, relative to the largest


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


def verify_artifact(
    folder: Path, source: Callable[[str], ModelSource] | None, *, provider: str = "auto", quiet: bool = False
) -> list[Check]:
    """Check everything that can be checked, and gather the results.

    Args:
        folder: The artifact.
        source: Finds the model to compare with, given its name in the manifest; None checks files and graphs only.
        provider: `auto`, `cpu` or `cuda`.
        quiet: No progress.

    Raises:
        TdaError: The artifact cannot be opened at all, or the reference is not its model.
    """
    artifact = open_artifact(folder)
    checks = [_hashes(artifact, quiet), *_graphs(artifact)]
    if source is None or not all(check.passed for check in checks):
        return checks  # numbers from altered files would only add noise
    model = source(artifact.name)
    if model.fingerprint != artifact.manifest["model"]["fingerprint"]:
        raise TdaError(
            f"{folder} was built from another model than {model.name} (their fingerprints differ). "
            "Give its own model with --against."
        )
    with progress("Comparing with transformers", 3 * len(PROMPTS) + 1, quiet=quiet) as advance:
        return checks + Comparison(artifact, model, choose_provider(provider, artifact.shape.dtype), advance).run()


def _hashes(artifact: Artifact, quiet: bool) -> Check:
    files = artifact.manifest["files"]
    altered = []
    with progress("Checking hashes", sum(entry["size"] for entry in files.values()), quiet=quiet) as advance:
        for name, entry in files.items():
            if sha256(artifact.file(name), advance) != entry["sha256"]:
                altered.append(name)
    problem = f"{', '.join(altered)}: altered since the build" if altered else None
    return Check("files match their hashes", problem=problem)


def _graphs(artifact: Artifact) -> list[Check]:
    checks = []
    for file in (contract.PREFILL_FILE, contract.DECODE_FILE):
        problem = None
        try:
            onnx.checker.check_model(str(artifact.file(file)))
            model = onnx.load(artifact.file(file), load_external_data=False)
            problem = _external_data_problem(artifact, model)
        except Exception as error:  # the checker and protobuf raise their own kinds
            problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
        checks.append(Check(f"{file} passes onnx.checker", problem=problem))
    return checks


def _external_data_problem(artifact: Artifact, model: onnx.ModelProto) -> str | None:
    size = artifact.file(contract.WEIGHTS_FILE).stat().st_size
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        if entry["location"] != contract.WEIGHTS_FILE:
            return f"{tensor.name} lies in {entry['location']!r} instead of {contract.WEIGHTS_FILE}"
        if int(entry["offset"]) + int(entry["length"]) > size:
            return f"{tensor.name} reaches past the end of {contract.WEIGHTS_FILE}"
    return None


@dataclass
class Worst:
    """The largest difference of one check so far, and what is allowed for it."""

    difference: float = 0.0
    allowed: float = 0.0

    def add(self, difference: float, allowed: float) -> None:
        # Keep the comparison that is worst relative to what it is allowed; NaN is worse than anything.
        if np.isnan(difference) or difference * self.allowed >= self.difference * allowed or not self.allowed:
            self.difference, self.allowed = difference, allowed


class Comparison:
    """The artifact's graphs beside transformers in float32 (and, for float16 artifacts, in float16 too)."""

    def __init__(self, artifact: Artifact, source: ModelSource, provider: str, advance: Advance) -> None:
        self.artifact, self.shape, self.advance = artifact, artifact.shape, advance
        self.spec: DecoderSpec = source.spec
        device = "cuda" if provider == CUDA and torch.cuda.is_available() else "cpu"
        self.reference = source.reference(device=device)
        self.half = source.reference(dtype=torch.float16, device=device) if self.shape.dtype == "float16" else None
        self.sessions = Sessions(artifact, provider)
        self.provider = provider
        self.worst: dict[str, Worst] = {}
        advance(1)

    def run(self) -> list[Check]:
        """Compare on every prompt and return the largest differences."""
        text = Text(self.artifact)
        for prompt in PROMPTS:
            tokens = text.encode(prompt)
            self._compare(tokens[:-CONTINUATION_TOKENS], tokens[-CONTINUATION_TOKENS:])
        return [Check(name, worst.difference, worst.allowed) for name, worst in self.worst.items()]

    def _compare(self, prompt: list[int], continuation: list[int]) -> None:
        cache = KvCache(self.shape, self.provider, self.shape.max_positions)
        logits = self._all_prompt_logits(prompt)
        dense, dense_continuation = reference_logits(self.reference, self.spec, prompt, continuation)
        half = reference_logits(self.half, self.spec, prompt, continuation) if self.half else (None, None)
        self._logits("prefill logits", logits, dense, half[0])

        _, mask = prefill(self.sessions, self.shape, prompt, cache)
        self._scores(prompt, mask)
        self.advance(1)

        start = cache.length
        every = self._decode(continuation, cache, None)
        self._logits("decode with all neurons", every, dense_continuation, half[1])
        masks, tails = self._deployed_mask(mask)
        cache.truncate(start)
        masked = self._decode(continuation, cache, mask)
        _, expected = reference_logits(self.reference, self.spec, prompt, continuation, masks, tails)
        half_masked = (
            reference_logits(self.half, self.spec, prompt, continuation, masks, tails)[1] if self.half else None
        )
        self._logits("decode with the prompt's mask", masked, expected, half_masked)
        self._halved(prompt, continuation, cache, start)
        self.advance(1)

        cache.truncate(start)
        self._chunked(prompt, cache, mask)
        self.advance(1)

    def _halved(self, prompt: list[int], continuation: list[int], cache: KvCache, start: int) -> None:
        """Decode with every second neuron and padding, whatever the artifact's own mask is."""
        kept = torch.zeros(self.shape.ffn_size)
        kept[::2] = 1
        padded = np.append(np.arange(0, self.shape.ffn_size, 2), [contract.PADDING_INDEX] * 3).astype(np.int32)
        indices = device_tensor(padded, self.provider)
        layers = range(self.shape.num_layers)
        mask = PromptMask({contract.mask_indices(i): indices for i in layers}, {}, 0)
        masks, tails = [kept] * len(layers), [torch.zeros(self.shape.hidden_size)] * len(layers)
        cache.truncate(start)
        halved = self._decode(continuation, cache, mask)
        _, expected = reference_logits(self.reference, self.spec, prompt, continuation, masks, tails)
        half = reference_logits(self.half, self.spec, prompt, continuation, masks, tails)[1] if self.half else None
        self._logits("decode with every second neuron", halved, expected, half)

    def _chunked(self, prompt: list[int], cache: KvCache, mask: PromptMask) -> None:
        pieces = KvCache(self.shape, self.provider, self.shape.max_positions)
        _, chunked = prefill(self.sessions, self.shape, prompt, pieces, chunk=CHUNK)
        for layer in range(self.shape.num_layers):
            for whole, parts in zip(cache.keys_and_values(layer), pieces.keys_and_values(layer), strict=True):
                self._relative("keys and values after chunked prefill", parts, whole)
            self._same_mask("mask after chunked prefill", layer, chunked, mask)

    def _all_prompt_logits(self, prompt: list[int]) -> np.ndarray:
        call = Call(self.sessions.prefill)
        cache = KvCache(self.shape, self.provider, self.shape.max_positions)
        cache.reserve(len(prompt))
        call.feed(contract.INPUT_IDS, np.array([prompt], np.int64))
        call.feed(contract.ATTENTION_MASK, cache.mask)
        call.feed(contract.NUM_LOGITS, device_tensor(np.zeros(1, np.int64), "cpu"))
        cache.bind(call)
        call.allocate(contract.LOGITS, "cpu")
        return call.run()[contract.LOGITS].numpy()[0]  # [P, V]

    def _decode(self, continuation: list[int], cache: KvCache, mask: PromptMask | None) -> np.ndarray:
        """Decode the continuation: its first token alone (S = 1), the others in one call. Returns [C, V]."""
        rows = []
        for piece in (continuation[:1], continuation[1:]):
            cache.reserve(len(piece))
            call = Call(self.sessions.decode)
            call.feed(contract.INPUT_IDS, np.array([piece], np.int64))
            call.feed(contract.ATTENTION_MASK, cache.mask)
            cache.bind(call)
            for name, value in (mask.inputs if mask else {}).items():
                call.feed(name, value)
            call.allocate(contract.LOGITS, "cpu")
            rows.append(call.run()[contract.LOGITS].numpy()[0])
            cache.commit()
        return np.concatenate(rows)

    def _deployed_mask(self, mask: PromptMask) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        masks, tails = [], []
        for layer in range(self.shape.num_layers):
            indices = mask.inputs[contract.mask_indices(layer)].numpy()
            kept = torch.zeros(self.shape.ffn_size)
            kept[indices[indices >= 0].astype(np.int64)] = 1
            masks.append(kept)
            tails.append(torch.from_numpy(mask.inputs[contract.tail_mean(layer)].numpy().astype(np.float32)))
        return masks, tails

    def _scores(self, prompt: list[int], mask: PromptMask) -> None:
        magnitude = self.artifact.manifest["method"]["statistic"] == "magnitude"
        expected = reference_scores(self.reference, self.spec, prompt, magnitude=magnitude)
        for layer, scores in enumerate(expected):
            self._relative("neuron scores", _scores_of(mask, layer), scores.numpy())

    def _same_mask(self, name: str, layer: int, one: PromptMask, other: PromptMask) -> None:
        """Masks may differ only in neurons whose scores stand at the border of the mask, within rounding."""
        scores = _scores_of(other, layer)
        first, second = (set(m.inputs[contract.mask_indices(layer)].numpy().tolist()) for m in (one, other))
        border = min((scores[i] for i in second if i >= 0), default=float(scores.max()))
        distance = max((abs(float(scores[i]) - border) / border for i in first ^ second if i >= 0), default=0.0)
        self._add(name, distance, RELATIVE[self.shape.dtype])

    def _logits(self, name: str, ours: np.ndarray, expected: torch.Tensor, half: torch.Tensor | None) -> None:
        allowed = FLOAT32_LOGITS if half is None else HALF_FACTOR * float((half - expected).abs().max())
        self._add(name, float(np.abs(ours - expected.numpy()).max()), allowed)

    def _relative(self, name: str, ours: np.ndarray, expected: np.ndarray) -> None:
        scale = float(np.abs(expected).max()) or 1.0
        self._add(name, float(np.abs(ours.astype(np.float32) - expected).max()) / scale, RELATIVE[self.shape.dtype])

    def _add(self, name: str, difference: float, allowed: float) -> None:
        self.worst.setdefault(name, Worst()).add(float(difference), float(allowed))


def _scores_of(mask: PromptMask, layer: int) -> np.ndarray:
    stats: Any = mask.stats[contract.past_neuron_stats(layer)].numpy()
    return np.sqrt(stats[contract.SCORE_ROW] / mask.stats[contract.PAST_STATS_WEIGHT].numpy())
