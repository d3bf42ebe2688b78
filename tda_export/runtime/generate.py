"""Generate tokens: prefill the prompt, take its prompt mask, decode with it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tda_export.errors import TdaError
from tda_export.runtime.artifact import Artifact
from tda_export.runtime.deployment import AnyDeployment
from tda_export.runtime.lookup import FIRST_LENGTH, Lookahead, TextIndex, next_length
from tda_export.runtime.memory import Cancelled, PromptMemory
from tda_export.runtime.sampling import RepetitionPenalty, Sampler
from tda_export.runtime.session import Sessions, alone_on
from tda_export.runtime.stop_strings import StopStrings
from tda_export.runtime.text import TextStream
from tda_export.runtime.token_step import TokenStep

MaskMode = Literal["tda", "priced", "dense"]  # which rows decode reads: those of the prompt mask, by price, or all


@dataclass(frozen=True)
class Token:
    """A generated token and the text that it completes.

    The text is empty in the middle of a character that spans several tokens, and where a stop string may have begun.
    """

    id: int
    text: str


@dataclass
class Metrics:
    """What a generation cost. Times in seconds, sizes in bytes, density and sparsity as fractions.

    `density` is the share of neurons in the current prompt mask or, at a price, the share of rows that are expected to
    be read. `matrices` says which weights may be skipped, and so what `sparsity` and bytes refer to: `ffn` or, with
    prices, `linears` (attention and FFN). `sparsity` is the share of their bytes that decoding has not read so far,
    refreshes included. The rows that each token skips (by token thresholds or prices) are not counted while decoding;
    calibration's expectation stands for them. `refreshes` counts tokens that came from reading the last ones densely.
    `reused_tokens` is how many tokens of the prompt were read before. `decode_steps` counts refreshes too, and a last
    step that gave an end token or finished after cancellation. `drafted` counts the tokens of a lookup that these steps
    read as drafts, and `accepted` those that needed no step of their own; `bytes_per_token` ignores that several tokens
    of one step share reads. `decode_tokens_per_second` starts at the second token; the first comes from prefill. It
    leaves out what the caller does between tokens, except where the next step is under way meanwhile. `finish_reason`:
    an end token or a stop string, the token limit, a full context, or empty if the generation is not finished or was
    cancelled.
    """

    provider: str
    mask: MaskMode
    prompt_tokens: int
    matrices: Literal["ffn", "linears"] = "ffn"
    reused_tokens: int = 0
    new_tokens: int = 0
    density: float = 1.0
    sparsity: float = 0.0
    refreshes: int = 0
    time_to_first_token: float = 0.0
    decode_steps: int = 0
    drafted: int = 0
    accepted: int = 0
    decode_seconds: float = 0.0
    decode_tokens_per_second: float | None = None
    bytes_per_token: int = 0
    dense_bytes_per_token: int = 0
    finish_reason: Literal["", "stop", "length", "context"] = ""


class Generation:
    """An iterator of tokens; `metrics` and `text` are current at every step.

    An unfinished generation returns its decode step (and KV cache) when it is closed or dropped. `cancel` may be called
    from another thread or a signal handler, all else only from one thread. Generations of several threads run at once
    on the CPU and take turns on a GPU, a prompt or a token at a time.
    """

    def __init__(self, decoding: Decoding) -> None:
        self._decoding = decoding
        self._provider = decoding.metrics.provider
        # The generator's frame holds the decoding, not this object: in a cycle, dropping this object would free
        # nothing.
        self._tokens = decoding.tokens()

    @property
    def metrics(self) -> Metrics:
        """What the generation has cost so far."""
        return self._decoding.metrics

    @property
    def text(self) -> str:
        """The text so far."""
        return self._decoding.text

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._decoding.cancelled

    def cancel(self) -> None:
        """End the generation before its next token, or between two pieces of a long prompt that is read into a
        memory."""
        self._decoding.cancelled = True

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        with alone_on(self._provider):
            return next(self._tokens)

    def close(self) -> None:
        """End the generation here. The model's decode step is free for the next generation; no more tokens come."""
        with alone_on(self._provider):
            self._tokens.close()


class Decoding:
    """The state of a generation: prompt, limits and sampler, and the text and metrics so far."""

    def __init__(
        self,
        artifact: Artifact,
        sessions: Sessions,
        prompt: list[int],
        *,
        max_new_tokens: int,
        mask: MaskMode,
        sampler: Sampler | None,
        penalty: RepetitionPenalty | None,
        stream: TextStream,
        stops: StopStrings,
        ends: frozenset[int],
        context: int,
        deployment: AnyDeployment,
        borrow_step: Callable[[int], AbstractContextManager[TokenStep]],
        memory: PromptMemory | None,
        lookup: int,
    ) -> None:
        self._artifact, self._sessions = artifact, sessions
        self._prompt, self._max_new_tokens = prompt, max_new_tokens
        self._sampler, self._penalty, self._deployment = sampler, penalty, deployment
        self._stream, self._stops, self._ends = stream, stops, ends
        self._shares: list[float] = []  # shares of FFN bytes read, by decoded token
        self._sparse_share = 1.0
        self._capacity, self._borrow_step = min(context, len(prompt) + max_new_tokens), borrow_step
        self._memory, self._lookup = memory, lookup
        self._decoded: list[int] = []  # tokens of the answer that are in the cache
        self._stale: list[int] = []  # the newest token, and those before it whose keys and values sparse steps wrote
        self._text = TextIndex(prompt) if lookup else None
        self._draft_length = lookup if sessions.captures else FIRST_LENGTH
        self._ahead: Lookahead[np.ndarray | int] = Lookahead()
        self.cancelled = False
        self.text = ""
        self.metrics = Metrics(sessions.provider, mask, len(prompt), "linears" if sessions.priced else "ffn")

    def tokens(self) -> Generator[Token, None, None]:
        """Read the prompt, then yield the answer token by token, on a step that is borrowed for the time."""
        with self._borrow_step(self._capacity) as step:
            step.capture(1 + self._lookup)
            try:
                with contextlib.suppress(Cancelled):
                    yield from self._generate(step)
            finally:
                step.settle()
                if self._memory is not None:
                    self._memory.keep(self._decoded, self._deployment)

    def _generate(self, step: TokenStep) -> Iterator[Token]:
        metrics, started, how = self.metrics, time.perf_counter(), self._deployment
        logits = self._read(step)
        self._follow(step)
        token = self._choose(logits)
        metrics.time_to_first_token = time.perf_counter() - started
        while not self.cancelled:
            if token in self._ends:
                metrics.finish_reason = "stop"
                self.text += self._last_text()[0]
                return
            metrics.new_tokens += 1
            piece, stopped = self._stops.add(self._stream.add(token))
            if stopped:
                metrics.finish_reason = "stop"
            elif metrics.new_tokens == self._max_new_tokens:
                metrics.finish_reason = "length"
            elif step.cache.length + 1 == self._capacity:  # the new token is not in the cache yet
                metrics.finish_reason = "context"
            if metrics.finish_reason and not stopped:
                last, stopped = self._last_text()
                piece += last
                if stopped:  # the text of an unfinished character held a stop string
                    metrics.finish_reason = "stop"
            self.text += piece
            yield Token(token, piece)
            if metrics.finish_reason:
                return
            if not step.is_ahead:  # otherwise the step has been under way since the last one ended
                started = time.perf_counter()
            self._stale.append(token)
            if self._text is not None:
                self._text.add(token)
            if len(self._stale) == self._refresh_tokens:
                logits = step.refresh(self._stale, how)
                self._follow(step)
                following, self._stale, self._ahead = self._choose(logits), [], Lookahead()
                metrics.refreshes += 1
                metrics.decode_steps += 1
                self._shares.append(1.0)
            else:
                following = self._next(step, token)
                self._shares.append(self._sparse_share)
            self._decoded.append(token)
            token = following
            self._account()
            ended = time.perf_counter()
            metrics.decode_seconds += ended - started
            metrics.decode_tokens_per_second = len(self._shares) / metrics.decode_seconds
            started = ended

    def _read(self, step: TokenStep) -> np.ndarray:
        if self._memory is None:
            return step.begin(self._prompt, self._deployment)
        logits, self.metrics.reused_tokens = self._memory.read(
            step, self._prompt, self._deployment, lambda: self.cancelled
        )
        return logits

    def _last_text(self) -> tuple[str, bool]:
        """Return the text that was held back, up to a stop string, and whether there was one."""
        piece, stopped = self._stops.add(self._stream.finish())
        return (piece if stopped else piece + self._stops.finish()), stopped

    @property
    def _refresh_tokens(self) -> int:
        return 0 if self.metrics.mask == "dense" else self._deployment.refresh.tokens

    def _next(self, step: TokenStep, token: int) -> int:
        """Return the token that follows: from the step that has read `token` as a draft, or from one more step."""
        if self._ahead.confirm(token):
            step.cache.confirm(1)
            self.metrics.accepted += 1
        else:
            tokens = [token, *self._draft(step)]
            # The step itself chooses the likeliest tokens.
            greedy = self._sampler is None and self._penalty is None
            following: list[Any]
            if greedy:
                following = step.greedy_each(tokens, ahead=self._one_more(step)).tolist()
            else:
                following = list(step.logits_each(tokens))
            self._ahead = Lookahead(tokens, following)
            self.metrics.decode_steps += 1
            self.metrics.drafted += self._ahead.drafted
        chosen = self._ahead.following
        if not isinstance(chosen, int):
            return self._choose(chosen)
        if chosen < 0:
            raise self._not_finite()
        return chosen

    def _one_more(self, step: TokenStep) -> bool:
        """Whether a plain step follows the next one, unless its token ends the text."""
        return (
            self._text is None
            and self.metrics.new_tokens + 1 < self._max_new_tokens
            and step.cache.length + 2 < self._capacity
            and len(self._stale) + 1 != self._refresh_tokens
        )

    def _draft(self, step: TokenStep) -> list[int]:
        """Guess the tokens that follow the newest one, at most as many as fit before a refresh or the end."""
        if self._text is None:
            return []
        if not self._sessions.captures:  # captured calls are padded, so a longer draft costs nothing there
            self._draft_length = next_length(self._draft_length, self._ahead, self._lookup)
        most = min(self._draft_length, self._capacity - step.cache.length - 2)
        if self._refresh_tokens:
            most = min(most, self._refresh_tokens - len(self._stale) - 1)
        return self._text.draft(most)

    def _choose(self, logits: np.ndarray) -> int:
        if not np.isfinite(logits).all():
            raise self._not_finite()
        if self._penalty is not None:
            logits = self._penalty.apply(logits)
        token = int(logits.argmax()) if self._sampler is None else self._sampler(logits)
        if self._penalty is not None:
            self._penalty.add(token)
        return token

    def _not_finite(self) -> TdaError:
        position = self.metrics.prompt_tokens + self.metrics.new_tokens
        return TdaError(
            f"The model produced logits that are not finite at token {position}. "
            "float16 may overflow with this model: build it with --dtype bf16, or with fp32 and run it on the CPU."
        )

    def _follow(self, step: TokenStep) -> None:
        """Decode from now on by what was read (or densely), and note the share that a step reads."""
        reading = step.follow(None if self.metrics.mask == "dense" else self._deployment)
        self.metrics.density, self._sparse_share = reading.density, reading.share
        self._account()

    def _account(self) -> None:
        metrics, dense = self.metrics, self._artifact.sparse_bytes
        share = sum(self._shares) / len(self._shares) if self._shares else self._sparse_share
        metrics.sparsity = 1.0 - share
        metrics.bytes_per_token, metrics.dense_bytes_per_token = round(share * dense), dense
