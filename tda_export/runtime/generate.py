"""Generate tokens: prefill the prompt, take its mask, decode with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tda_export.errors import TdaError
from tda_export.runtime.artifact import Artifact
from tda_export.runtime.decode_step import DecodeStep
from tda_export.runtime.phases import PromptMask
from tda_export.runtime.sampling import Sampler
from tda_export.runtime.session import Sessions
from tda_export.runtime.text import TextStream

MaskMode = Literal["tda", "dense"]


@dataclass(frozen=True)
class Token:
    """A generated token and the text that it completes (empty inside a character of several tokens)."""

    id: int
    text: str


@dataclass
class Metrics:
    """What a generation cost. Times in seconds, sizes in bytes, density and sparsity as fractions.

    `density` is the share of neurons in the mask, `sparsity` the share of FFN bytes that decode did not read.
    `decode_tokens_per_second` starts at the second token; the first comes from prefill.
    """

    provider: str
    mask: MaskMode
    prompt_tokens: int
    new_tokens: int = 0
    density: float = 1.0
    sparsity: float = 0.0
    time_to_first_token: float = 0.0
    decode_seconds: float = 0.0
    decode_tokens_per_second: float | None = None
    ffn_bytes_per_token: int = 0
    dense_ffn_bytes_per_token: int = 0
    finish_reason: Literal["", "stop", "length", "context"] = ""


class Generation:
    """An iterator of tokens; `metrics` and `text` are current at every step.

    One that is not read to its end gives its decode step (and KV cache) back when it is closed or dropped.
    """

    def __init__(self, decoding: Decoding) -> None:
        self._decoding = decoding
        # Its frame holds the decoding and not this object: were it a cycle, dropping this object would free nothing.
        self._tokens = decoding.tokens()

    @property
    def metrics(self) -> Metrics:
        """What it cost so far."""
        return self._decoding.metrics

    @property
    def text(self) -> str:
        """The text so far."""
        return self._decoding.text

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        return next(self._tokens)

    def close(self) -> None:
        """End it here. The model's decode step is free for the next generation; no more tokens come."""
        self._tokens.close()


class Decoding:
    """What a generation is made of: prompt, limits and sampler, and the text and metrics so far."""

    def __init__(
        self,
        artifact: Artifact,
        sessions: Sessions,
        prompt: list[int],
        *,
        max_new_tokens: int,
        mask: MaskMode,
        sampler: Sampler | None,
        stream: TextStream,
        context: int,
        thresholds: np.ndarray | None,
        borrow_step: Callable[[int], AbstractContextManager[DecodeStep]],
    ) -> None:
        self._artifact, self._sessions = artifact, sessions
        self._prompt, self._max_new_tokens = prompt, max_new_tokens
        self._sampler, self._stream, self._thresholds = sampler, stream, thresholds
        self._capacity, self._borrow_step = min(context, len(prompt) + max_new_tokens), borrow_step
        self.text = ""
        self.metrics = Metrics(sessions.provider, mask, len(prompt))

    def tokens(self) -> Generator[Token, None, None]:
        """Read the prompt, then yield the answer token by token, on a step borrowed meanwhile."""
        with self._borrow_step(self._capacity) as step:
            step.capture()
            yield from self._generate(step)

    def _generate(self, step: DecodeStep) -> Iterator[Token]:
        metrics, started = self.metrics, time.perf_counter()
        logits, mask = step.read(self._prompt, self._thresholds)
        step.use(mask if metrics.mask == "tda" else None)
        token = self._choose(logits)
        metrics.time_to_first_token = time.perf_counter() - started
        self._account(mask)
        steps = 0
        while True:
            if token in self._artifact.eos_token_ids:
                metrics.finish_reason = "stop"
                self.text += self._stream.finish()
                return
            metrics.new_tokens += 1
            piece = self._stream.add(token)
            if metrics.new_tokens == self._max_new_tokens:
                metrics.finish_reason = "length"
            elif step.cache.length + 1 == self._capacity:  # the new token is not in the cache yet
                metrics.finish_reason = "context"
            if metrics.finish_reason:
                piece += self._stream.finish()
            self.text += piece
            yield Token(token, piece)
            if metrics.finish_reason:
                return
            started = time.perf_counter()
            token = self._next(step, token)
            steps += 1
            metrics.decode_seconds += time.perf_counter() - started
            metrics.decode_tokens_per_second = steps / metrics.decode_seconds

    def _next(self, step: DecodeStep, token: int) -> int:
        if self._sampler is not None:
            return self._choose(step.logits(token))
        chosen = step.greedy(token)
        if chosen < 0:
            raise self._not_finite()
        return chosen

    def _choose(self, logits: np.ndarray) -> int:
        if not np.isfinite(logits).all():
            raise self._not_finite()
        return int(logits.argmax()) if self._sampler is None else self._sampler(logits)

    def _not_finite(self) -> TdaError:
        position = self.metrics.prompt_tokens + self.metrics.new_tokens
        return TdaError(
            f"The model produced logits that are not finite at token {position}. "
            "float16 may overflow with this model: build it with --dtype bf16, or with fp32 and run it on the CPU."
        )

    def _account(self, mask: PromptMask) -> None:
        shape, metrics = self._artifact.shape, self.metrics
        neurons = shape.num_layers * shape.ffn_size
        kept = mask.count(shape.num_layers) if metrics.mask == "tda" else neurons
        metrics.density = kept / neurons
        metrics.sparsity = 1.0 - metrics.density
        metrics.ffn_bytes_per_token = kept * self._artifact.bytes_per_neuron
        metrics.dense_ffn_bytes_per_token = neurons * self._artifact.bytes_per_neuron
