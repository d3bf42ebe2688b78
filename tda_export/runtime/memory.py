"""Prompts that begin like the previous one: what was read stays, and only what is new is read."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tda_export.errors import TdaError
from tda_export.runtime.deployment import AnyDeployment, PriceDeployment
from tda_export.runtime.phases import CHUNK_TOKENS
from tda_export.runtime.token_step import TokenStep

FIRST_ROOM = 2048  # tokens
CHECKPOINTS = 16  # the newest; each holds 2 L F numbers


class Cancelled(Exception):
    """The reading of a prompt was cancelled."""


@dataclass(frozen=True)
class Checkpoint:
    """What a step needs to go back to the first `length` tokens."""

    length: int
    state: Any


class PromptMemory:
    """A decode step that keeps keys, values and statistics from prompt to prompt, for one generation at a time.

    Only the common prefix of a prompt and the tokens held stays. A step with prompt masks goes back to the last
    checkpoint within that prefix; checkpoints are the ends of prompts and of pieces of `CHUNK_TOKENS`. A step with
    prices goes back to any length.

    An answer was decoded sparsely, so a prompt that holds it reads it again, densely: keys, values, statistics and
    prompt mask are then those of one prefill of the whole prompt, whatever was generated, refreshed or cancelled in
    between. With `keep_answers`, which the statistics of prompt masks do not allow, an answer stays as sparse steps
    wrote it, for prompts that are answered at the same price or a higher one: tokens written at a higher price than the
    new one are read again.
    """

    def __init__(
        self,
        open_step: Callable[[int], TokenStep],
        most_tokens: int,
        first_room: int = FIRST_ROOM,
        *,
        keep_answers: bool = False,
    ) -> None:
        """Begin empty.

        Args:
            open_step: Makes a step with room for a given number of tokens.
            most_tokens: The room does not grow beyond this, unless a generation asks for more.
            first_room: The least room of the first step, in tokens, so that a few turns fit.
            keep_answers: Let answers stay; only for steps of `any_length`.
        """
        self._open_step, self._most_tokens, self._least_room = open_step, most_tokens, first_room
        self._keeps_answers = keep_answers
        self._step: TokenStep | None = None
        self._lent = False
        self._read_as: object = None
        self._tokens: list[int] = []
        # For each token, the highest price at which it or an earlier one was decoded, 0 for tokens read: never falls.
        self._prices: list[float] = []
        self._checkpoints: list[Checkpoint] = []

    def opens_by(self, open_step: Callable[[int], TokenStep]) -> bool:
        """Return whether this memory's steps are made by `open_step`."""
        return bool(self._open_step == open_step)

    @contextlib.contextmanager
    def borrow_step(self, tokens: int) -> Iterator[TokenStep]:
        """Lend the step, with room for `tokens` tokens.

        A step that is too small is replaced by one of at least twice its size, which reads the next prompt from the
        start.

        Raises:
            TdaError: The step is lent already.
        """
        if self._lent:
            raise TdaError("The previous answer is not finished. Read it to its end, or close it.")
        self._lent = True
        try:
            if self._step is None or self._step.cache.capacity < tokens:
                room = max(tokens, min(self._least_room, self._most_tokens))
                self.forget()
                self._step = None  # freed before the next one takes memory
                self._step = self._open_step(room)
                self._least_room = 2 * room
            self._step.cache.truncate(min(self._step.cache.length, len(self._tokens)))  # room for a capture
            yield self._step
        finally:
            self._lent = False

    def read(
        self, step: TokenStep, tokens: Sequence[int], how: AnyDeployment, cancelled: Callable[[], bool] = lambda: False
    ) -> tuple[np.ndarray, int]:
        """Read a prompt, or only its new part.

        Args:
            step: The step borrowed from this memory.
            tokens: The whole prompt, at least one token.
            how: The deployment, which says what decoding needs from the prompt (such as its mask).
            cancelled: Called before every piece; True cancels the reading.

        Returns:
            The last token's logits, float32 [V], and the number of tokens that were not read again.

        Raises:
            Cancelled: `cancelled` returned True.
        """
        if how.read_as != self._read_as:
            self.forget()
            self._read_as = how.read_as
        # At least one token is read, since its logits are needed.
        held = common_prefix(self._tokens, tokens[:-1])
        if isinstance(how, PriceDeployment):
            held = min(held, bisect.bisect_right(self._prices, how.price))
        if step.any_length:
            step.rewind(held, None)
        else:
            self._checkpoints = [point for point in self._checkpoints if point.length <= held]
            held = self._checkpoints[-1].length if self._checkpoints else 0
            if held:
                step.rewind(held, self._checkpoints[-1].state)
            else:
                step.cache.truncate(0)
        del self._tokens[held:], self._prices[held:]
        for start in range(held, len(tokens), CHUNK_TOKENS):
            if cancelled():
                raise Cancelled
            piece = tokens[start : start + CHUNK_TOKENS]
            logits = step.begin(piece, how, more=start > 0)
            if not np.isfinite(logits).all():
                break  # the caller reports it; nothing of this piece is kept
            if not step.any_length:
                self._checkpoints.append(Checkpoint(start + len(piece), step.checkpoint()))
            self._hold(piece, 0.0)
        self._checkpoints = self._checkpoints[-CHECKPOINTS:]
        return logits, held

    def keep(self, tokens: Sequence[int], how: AnyDeployment) -> None:
        """Keep decoded tokens after the prompt that was read last, if this memory keeps answers.

        Args:
            tokens: The decoded tokens in the cache; an answer's last token is not among them.
            how: The deployment that decoded them.
        """
        if self._keeps_answers:
            assert isinstance(how, PriceDeployment)
            self._hold(tokens, how.price)

    def forget(self) -> None:
        """Read the next prompt from its beginning."""
        self._tokens, self._prices, self._checkpoints = [], [], []

    def _hold(self, tokens: Sequence[int], price: float) -> None:
        self._tokens += tokens
        self._prices += [max(price, self._prices[-1] if self._prices else 0.0)] * len(tokens)


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((position for position, (a, b) in pairs if a != b), min(len(one), len(other)))
