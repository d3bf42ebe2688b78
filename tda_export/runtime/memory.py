"""Prompts that begin as the one before: what was read stays, and only what is new is read."""

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
    """The reading of a prompt was given up."""


@dataclass(frozen=True)
class Checkpoint:
    """What a step needs to go back to the first `length` tokens."""

    length: int
    state: Any


class PromptMemory:
    """A decode step that keeps keys, values and statistics from prompt to prompt, for one generation at a time.

    Only what a prompt has in common with what is held stays. A step of masks goes back to the last checkpoint within
    it; checkpoints are the ends of prompts and of pieces of `CHUNK_TOKENS`. A step of prices goes back to any length.

    An answer was decoded sparsely, so a prompt that holds it reads it again, densely: keys, values, statistics and mask
    are then those of one prefill of the whole prompt, whatever was generated, refreshed or cancelled in between. With
    `keep_answers`, which statistics of masks do not allow, it stays as sparse steps left it, for prompts that are
    answered at the same price or a higher one: what was written at a higher price than asked for is read again.
    """

    def __init__(
        self,
        open_step: Callable[[int], TokenStep],
        most_tokens: int,
        first_room: int = FIRST_ROOM,
        *,
        keep_answers: bool = False,
    ) -> None:
        """Begin with nothing.

        Args:
            open_step: Makes a step with room for so many tokens.
            most_tokens: The room does not grow beyond this, unless a generation asks for more.
            first_room: Of the first step at least, so that a few turns fit.
            keep_answers: Let answers stay; for steps of `any_length` alone.
        """
        self._open_step, self._most_tokens, self._least_room = open_step, most_tokens, first_room
        self._keeps_answers = keep_answers
        self._step: TokenStep | None = None
        self._lent = False
        self._read_as: object = None
        self._tokens: list[int] = []
        # Of each token the highest price at which it or one before was decoded, 0 for what was read: it never falls.
        self._prices: list[float] = []
        self._checkpoints: list[Checkpoint] = []

    @contextlib.contextmanager
    def borrow_step(self, tokens: int) -> Iterator[TokenStep]:
        """Lend the step with room for `tokens`.

        One that is too small gives way to one of at least twice its size, into which the next prompt is read whole.

        Raises:
            TdaError: It is lent already.
        """
        if self._lent:
            raise TdaError("The previous answer is not finished. Read it to its end, or close it.")
        self._lent = True
        try:
            if self._step is None or self._step.cache.capacity < tokens:
                room = max(tokens, min(self._least_room, self._most_tokens))
                self.forget()
                self._step = None  # before the next one takes memory
                self._step = self._open_step(room)
                self._least_room = 2 * room
            self._step.cache.truncate(min(self._step.cache.length, len(self._tokens)))  # room for a capture
            yield self._step
        finally:
            self._lent = False

    def read(
        self, step: TokenStep, tokens: Sequence[int], how: AnyDeployment, cancelled: Callable[[], bool] = lambda: False
    ) -> tuple[np.ndarray, int]:
        """Read a prompt, or what is new of it.

        Args:
            step: Borrowed from here.
            tokens: The whole prompt, at least one token.
            how: What of it is to be noted for decoding.
            cancelled: Asked before every piece.

        Returns:
            The last token's logits, float32 [V], and the number of tokens that were not read again.

        Raises:
            Cancelled: `cancelled` said so.
        """
        if how.read_as != self._read_as:
            self.forget()
            self._read_as = how.read_as
        # One token at least is read: its logits are asked for.
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
                break  # which the caller reports; nothing of this piece is kept
            if not step.any_length:
                self._checkpoints.append(Checkpoint(start + len(piece), step.checkpoint()))
            self._hold(piece, 0.0)
        self._checkpoints = self._checkpoints[-CHECKPOINTS:]
        return logits, held

    def keep(self, tokens: Sequence[int], how: AnyDeployment) -> None:
        """Let decoded tokens stay behind the prompt that was read last, if this memory keeps answers.

        Args:
            tokens: Those that are in the cache: an answer's last one is not.
            how: By which they were decoded.
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
