"""Prompts that begin as the one before: what was read stays, and only what is new is read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tda_export.errors import TdaError
from tda_export.runtime.deployment import AnyDeployment
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

    A prompt is read from the last checkpoint on that lies within what it has in common with the prompt before;
    checkpoints are the ends of prompts and of pieces of `CHUNK_TOKENS`. Only prompts count as read. An answer was
    decoded under a mask, so a prompt that holds it reads it again, densely: keys, values, statistics and mask are then
    those of one prefill of the whole prompt, whatever was generated, refreshed or cancelled in between.
    """

    def __init__(self, open_step: Callable[[int], TokenStep], most_tokens: int, first_room: int = FIRST_ROOM) -> None:
        """Begin with nothing.

        Args:
            open_step: Makes a step with room for so many tokens.
            most_tokens: The room does not grow beyond this, unless a generation asks for more.
            first_room: Of the first step at least, so that a few turns fit.
        """
        self._open_step, self._most_tokens, self._least_room = open_step, most_tokens, first_room
        self._step: TokenStep | None = None
        self._lent = False
        self._read_as: object = None
        self._tokens: list[int] = []
        self._checkpoints: list[Checkpoint] = []

    @contextlib.contextmanager
    def borrow_step(self, tokens: int) -> Iterator[TokenStep]:
        """Lend the step with room for `tokens`.

        One that is too small gives way to one of at least twice its size, into which the next prompt is read whole.

        Raises:
            TdaError: It is lent already.
        """
        if self._lent:
            raise TdaError("The answer before this one is not finished. Read it to its end, or close it.")
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
        common = common_prefix(self._tokens, tokens[:-1])
        self._checkpoints = [point for point in self._checkpoints if point.length <= common]
        held = self._checkpoints[-1].length if self._checkpoints else 0
        self._tokens = list(tokens[:held])
        if held:
            step.rewind(held, self._checkpoints[-1].state)
        else:
            step.cache.truncate(0)
        for start in range(held, len(tokens), CHUNK_TOKENS):
            if cancelled():
                raise Cancelled
            piece = tokens[start : start + CHUNK_TOKENS]
            logits = step.begin(piece, how, more=start > 0)
            if not np.isfinite(logits).all():
                break  # which the caller reports; nothing of this piece is kept
            self._checkpoints.append(Checkpoint(start + len(piece), step.checkpoint()))
            self._tokens += piece
        self._checkpoints = self._checkpoints[-CHECKPOINTS:]
        return logits, held

    def forget(self) -> None:
        """Read the next prompt from its beginning."""
        self._tokens, self._checkpoints = [], []


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((position for position, (a, b) in pairs if a != b), min(len(one), len(other)))
