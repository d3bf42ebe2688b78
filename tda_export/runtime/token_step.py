"""One token after another: everything bound once, and on CUDA captured once for every prompt."""

from __future__ import annotations

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
from tda_export.runtime.session import Call, Sessions, device_tensor, empty_tensor


class _CapturedHere(threading.local):
    """The steps that this thread has captured. They go with it, as ONNX Runtime's captures do; its id comes again."""

    def __init__(self) -> None:
        self.steps: weakref.WeakSet[TokenStep] = weakref.WeakSet()


_captured = _CapturedHere()


@dataclass(frozen=True)
class Reading:
    """What a step is expected to read: `density`, the share of rows or neurons that may be read, and `share`, that of
    the bytes that a token reads of the matrices that the method may skip rows of."""

    density: float
    share: float


DENSE = Reading(1.0, 1.0)


class TokenStep(ABC):
    """Reads prompts densely into a cache of its own, and decodes one token at a time.

    The likeliest token is chosen where the logits are and written where the next step reads its input, so that greedy
    decoding copies one number to the host for each token. ONNX Runtime keeps captured graphs for each thread.

    `any_length`: the cache alone says where reading stands, so that `rewind` takes any length and no checkpoint.
    """

    any_length = False

    def __init__(self, sessions: Sessions, shape: ModelShape, capacity: int) -> None:
        self.cache = KvCache(shape, sessions.provider, capacity)
        self._sessions, self._shape = sessions, shape
        self._token = device_tensor(np.zeros((1, 1), np.int64), sessions.provider)
        self._attended = device_tensor(self.cache.mask, sessions.provider)
        self._logits = empty_tensor((1, 1, shape.vocab_size), "float32", sessions.provider)
        self._greedy = True  # the call writes the next token itself
        self._call: Call

    @abstractmethod
    def begin(self, tokens: Sequence[int], how: AnyDeployment, *, more: bool = False) -> np.ndarray:
        """Append a prompt densely, or a further piece of one.

        Args:
            tokens: At least one; the cache has room for them.
            how: What of them is to be noted for decoding.
            more: They follow what was read before.

        Returns:
            The last token's logits, float32 [V].
        """

    @abstractmethod
    def follow(self, how: AnyDeployment | None) -> Reading:
        """Decode as a deployment says after what was read, from now on; None is dense."""

    def refresh(self, tokens: Sequence[int], how: AnyDeployment) -> np.ndarray:
        """Read the last tokens densely, which replaces the keys and values that sparse steps left.

        Args:
            tokens: The newest n tokens, of which all but the last are in the cache.
            how: As for `begin`.

        Returns:
            The last token's logits, float32 [V].
        """
        self.cache.truncate(self.cache.length - (len(tokens) - 1))
        return self.begin(tokens, how, more=True)

    def checkpoint(self) -> Any:
        """Return what `rewind` needs beside the cache to come back to where reading stands."""
        return None

    def rewind(self, length: int, checkpoint: Any) -> None:
        """Go back to where the cache held `length` tokens, given the checkpoint of that time."""
        self.cache.truncate(length)

    def greedy(self, token: int | None = None) -> int:
        """Append `token` (None: the one chosen last) and return the likeliest next one, -1 if logits are not finite."""
        self._run(token)
        if self._greedy:
            return int(self._token.numpy()[0, 0])
        logits = self._logits.numpy()[0, -1]
        chosen = int(logits.argmax()) if np.isfinite(logits).all() else -1
        self._token.update_inplace(np.array([[chosen]], np.int64))
        return chosen

    def logits(self, token: int) -> np.ndarray:
        """Append `token` and return the next one's logits, float32 [V]."""
        self._run(token)
        logits: np.ndarray = self._logits.numpy()[0, -1].copy()
        return logits

    def _run(self, token: int | None) -> None:
        self.cache.reserve(1)
        self._attended.update_inplace(self.cache.mask)
        if self._sessions.captures and self not in _captured.steps:
            # A capture runs the step several times, each with the token that the one before chose: what it leaves at
            # the new token's place is written over by the run that counts.
            held = self._token.numpy().copy()
            self._call.run_only()
            self._token.update_inplace(held)
            _captured.steps.add(self)
        if token is not None:
            self._token.update_inplace(np.array([[token]], np.int64))
        self._call.run_only()
        self.cache.commit()

    def capture(self) -> None:
        """Capture the step for this thread before its first prompt, so that no token waits for it."""
        if self._sessions.captures and self not in _captured.steps:
            held = self.cache.length
            self._run(0)  # at the place of the next token, which is written over
            self.cache.truncate(held)

    def _bind_tokens(self, call: Call) -> None:
        call.feed(contract.INPUT_IDS, self._token)
        call.feed(contract.ATTENTION_MASK, self._attended)
        self.cache.bind(call)
        call.write_to(contract.LOGITS, self._logits)
