"""Decode one token after another: inputs are bound once, and on CUDA one captured graph serves every prompt."""

from __future__ import annotations

import itertools
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tda_export.graph import contract
from tda_export.graph.contract import ModelShape
from tda_export.runtime.deployment import AnyDeployment
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.session import NO_GRAPH, Call, Sessions, device_tensor, empty_tensor


class Width:
    """Calls of one number of tokens: the memory of their inputs and outputs, and a call that is bound to it.

    Captured calls of one token take turns in two of these. Each reads the token that the other has chosen, so that one
    can be started before the host has seen what the other chose.
    """

    def __init__(self, tokens: int, shape: ModelShape, sessions: Sessions, capacity: int) -> None:
        provider = sessions.provider
        self.tokens = device_tensor(np.zeros((1, tokens), np.int64), provider)  # to read
        self.chosen = self.tokens  # the likeliest next ones
        self.attended = empty_tensor((1, capacity), "int64", provider)
        self.logits = empty_tensor((1, tokens, shape.vocab_size), "float32", provider)
        self.graph_id = sessions.next_graph_id() if sessions.captures else NO_GRAPH
        self.call: Call | None = None


class _CapturedHere(threading.local):
    """What this thread has captured. It ends with the thread, as ONNX Runtime's captures do; thread ids are reused."""

    def __init__(self) -> None:
        self.widths: weakref.WeakSet[Width] = weakref.WeakSet()


_captured = _CapturedHere()


@dataclass(frozen=True)
class Reading:
    """What a step is expected to read: `density`, the share of rows or neurons that may be read, and `share`, the share
    of bytes that a token reads of the matrices whose rows the method may skip."""

    density: float
    share: float


DENSE = Reading(1.0, 1.0)


class TokenStep(ABC):
    """Reads prompts densely into its own cache, and decodes one token at a time, or one token and a few drafts.

    The likeliest token is chosen on the device that holds the logits and written to the next step's input, so that
    greedy decoding copies one number per token to the host. ONNX Runtime keeps captured graphs for each thread. To keep
    them few, captured calls of several tokens are padded to the number that `capture` was given.

    `any_length`: whether the cache is the only state, so that `rewind` takes any length and needs no checkpoint.
    """

    any_length = False

    def __init__(self, sessions: Sessions, shape: ModelShape, capacity: int) -> None:
        self.cache = KvCache(shape, sessions.provider, capacity)
        self._sessions, self._shape = sessions, shape
        self._greedy = True  # the call writes the next tokens itself
        self._widths: dict[int, list[Width]] = {}  # by number of tokens; those of a number take turns
        self._most_tokens = 1  # the tokens of a captured call at most
        self._turn = 0  # of calls of one token
        self._ahead: Width | None = None  # the call that was started ahead
        self._expected = 0  # the token that it reads

    @abstractmethod
    def begin(self, tokens: Sequence[int], how: AnyDeployment, *, more: bool = False) -> np.ndarray:
        """Append a prompt densely, or a further piece of one.

        Args:
            tokens: At least one; the cache has room for them.
            how: The deployment, which says what decoding needs from the tokens (such as a prompt mask).
            more: The tokens continue what was read before.

        Returns:
            The last token's logits, float32 [V].
        """

    @abstractmethod
    def follow(self, how: AnyDeployment | None) -> Reading:
        """Decode by a deployment from now on, after what was read; None is dense."""

    def refresh(self, tokens: Sequence[int], how: AnyDeployment) -> np.ndarray:
        """Read the last tokens densely, which replaces the keys and values that sparse steps wrote.

        Args:
            tokens: The newest n tokens. All but the last are in the cache.
            how: As for `begin`.

        Returns:
            The last token's logits, float32 [V].
        """
        self.cache.truncate(self.cache.length - (len(tokens) - 1))
        return self.begin(tokens, how, more=True)

    def checkpoint(self) -> Any:
        """Return what `rewind` needs besides the cache to come back to the current position."""
        return None

    def rewind(self, length: int, checkpoint: Any) -> None:
        """Go back to where the cache held `length` tokens, given the checkpoint of that time."""
        self.cache.truncate(length)

    def greedy(self, token: int | None = None, *, ahead: bool = False) -> int:
        """Append `token` (None: the one chosen last) and return the likeliest next one, -1 if logits are not finite
        (see `greedy_each`)."""
        return int(self.greedy_each(None if token is None else [token], ahead=ahead)[0])

    def logits(self, token: int) -> np.ndarray:
        """Append `token` and return the next one's logits, float32 [V]."""
        logits: np.ndarray = self.logits_each([token])[0]
        return logits

    def greedy_each(self, tokens: Sequence[int] | None, *, ahead: bool = False) -> np.ndarray:
        """Append the first of a few tokens, read the others (drafts) after it, and return the likeliest token after
        each.

        The drafts count only once `cache.confirm` confirms them.

        Args:
            tokens: S token ids; the cache has room for them. None stands for one token, the likeliest of the last such
                call.
            ahead: The next call will be of the one token that this one chooses. Where calls are captured it is started
                already, so that the GPU works on while the host handles this token. Until then, use neither the step
                nor its cache, or call `settle` first.

        Returns:
            int64 [S], -1 where logits are not finite; only for the first token where a captured call of several does
            not fit into the cache.
        """
        width, read = self._take_ahead(tokens) or self._start(tokens)
        if ahead:
            self._start_ahead()
        self._finish(width)
        chosen: np.ndarray
        if self._greedy:
            chosen = width.chosen.numpy()[0, :read].copy()
        else:
            logits = width.logits.numpy()[0]
            chosen = np.where(np.isfinite(logits).all(axis=1), logits.argmax(axis=1), -1)
            width.chosen.update_inplace(chosen[None])
        self._expected = int(chosen[0])
        return chosen

    @property
    def is_ahead(self) -> bool:
        """Whether a call was started ahead."""
        return self._ahead is not None

    def settle(self) -> None:
        """Wait for a call that was started ahead, if there is one, and forget it."""
        if self._ahead is not None:
            width, self._ahead = self._ahead, None
            self._turn -= 1  # the token that it has read is still the newest
            if width.call:
                width.call.wait()

    def logits_each(self, tokens: Sequence[int]) -> np.ndarray:
        """Do the same as `greedy_each`, and return the logits after each token, float32 [S, V] or [1, V]."""
        self.settle()
        width, read = self._start(tokens)
        self._finish(width)
        return width.logits.numpy()[0, :read].copy()

    def _take_ahead(self, tokens: Sequence[int] | None) -> tuple[Width, int] | None:
        """Return the call that was started ahead if it reads these tokens."""
        if self._ahead is not None and (tokens is None or list(tokens) == [self._expected]):
            width, self._ahead = self._ahead, None
            return width, 1
        self.settle()
        return None

    def _start_ahead(self) -> None:
        """Start the call that reads what the one before it chooses, if that is captured and the cache has room."""
        width = self._width(1)
        if self._sessions.captures and width in _captured.widths and self.cache.length + 2 <= self.cache.capacity:
            self._start(None, uncommitted=1)
            self._ahead = width

    def _start(self, tokens: Sequence[int] | None, uncommitted: int = 0) -> tuple[Width, int]:
        """Start a call of tokens, after others that are not committed yet; return it and how many tokens it reads."""
        given = 1 if tokens is None else len(tokens)
        size = given
        if self._sessions.captures and given > 1:
            size = self._most_tokens
            if self.cache.length + size > self.cache.capacity:
                given = size = 1
        width = self._width(size)
        if self._sessions.captures and width not in _captured.widths:
            self._capture(width)
        self._turn += size == 1
        self._attend(width, uncommitted)
        call = self._call(width)
        if tokens is not None:
            padded = [*tokens[:given], *[tokens[0]] * (size - given)]
            width.tokens.update_inplace(np.array([padded], np.int64))
        if self._greedy:
            call.start()
        else:  # new memory: ONNX Runtime checks given memory against the default of num_logits
            call.allocate(contract.LOGITS, "cpu")
            width.logits = call.run()[contract.LOGITS]
        return width, given

    def _finish(self, width: Width) -> None:
        self._call(width).wait()
        self.cache.commit(1)

    def capture(self, most_tokens: int = 1) -> None:
        """Capture steps of one token and of `most_tokens` for this thread before its first prompt, so that no token
        waits for it."""
        self._most_tokens = most_tokens
        if not self._sessions.captures:
            return
        for tokens in sorted({1, most_tokens}):
            for width in self._of_size(tokens):
                if width not in _captured.widths and self.cache.length + tokens <= self.cache.capacity:
                    self._capture(width)

    def _capture(self, width: Width) -> None:
        """Capture a call, which runs it several times, at the places of the next tokens, which are overwritten
        later."""
        self._attend(width)
        self._call(width).run_only()
        _captured.widths.add(width)

    def _attend(self, width: Width, uncommitted: int = 0) -> None:
        """Reserve the cache for a call, after tokens that are not committed yet, and say what it attends to."""
        self.cache.reserve(uncommitted + width.tokens.shape()[1])
        width.attended.update_inplace(self.cache.mask)

    @abstractmethod
    def _bind(self, width: Width) -> Call:
        """Bind a call of this width for the current way of decoding."""

    def _width(self, tokens: int) -> Width:
        """Return the memory and call of the next call of so many tokens."""
        widths = self._of_size(tokens)
        return widths[self._turn % len(widths)]

    def _of_size(self, tokens: int) -> list[Width]:
        if tokens not in self._widths:
            capacity = self.cache.capacity
            first = Width(tokens, self._shape, self._sessions, capacity)
            self._widths[tokens] = [first]
            if tokens == 1 and self._sessions.captures:
                second = Width(tokens, self._shape, self._sessions, capacity)
                first.chosen, second.chosen = second.tokens, first.tokens
                self._widths[tokens].append(second)
        return self._widths[tokens]

    def _call(self, width: Width) -> Call:
        if width.call is None:
            width.call = self._bind(width)
        return width.call

    def _bind_anew(self) -> None:
        """Bind the next call of every width again."""
        for width in itertools.chain(*self._widths.values()):
            width.call = None

    def _bind_tokens(self, call: Call, width: Width) -> None:
        call.feed(contract.INPUT_IDS, width.tokens)
        call.feed(contract.ATTENTION_MASK, width.attended)
        self.cache.bind(call)
