"""Priced artifacts: prefill is plain and dense, and decode takes one number, the price of a byte."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tda_export.graph import contract
from tda_export.graph.contract import ModelShape
from tda_export.runtime.deployment import AnyDeployment, PriceDeployment
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import CHUNK_TOKENS
from tda_export.runtime.session import Call, Sessions, device_tensor, empty_tensor
from tda_export.runtime.token_step import DENSE, Reading, TokenStep, Width


class PricedPrefill:
    """Reads prompts into one cache. All inputs except the tokens are bound once."""

    def __init__(self, sessions: Sessions, shape: ModelShape, cache: KvCache) -> None:
        self._cache = cache
        self._logits = empty_tensor((1, 1, shape.vocab_size), "float32", "cpu")
        self._call = Call(sessions.prefill)
        cache.bind(self._call)
        self._call.write_to(contract.LOGITS, self._logits)

    def read(self, tokens: Sequence[int], *, chunk: int = CHUNK_TOKENS) -> np.ndarray:
        """Append tokens, at least one, to the cache in pieces, and return the last one's logits, float32 [V]."""
        for start in range(0, len(tokens), chunk):
            piece = tokens[start : start + chunk]
            self._cache.reserve(len(piece))
            self._call.feed(contract.INPUT_IDS, np.array([list(piece)], np.int64))
            self._call.feed(contract.ATTENTION_MASK, self._cache.mask)
            self._call.run_only()
            self._cache.commit()
        logits: np.ndarray = self._logits.numpy()[0, 0].copy()
        return logits


class PricedStep(TokenStep):
    """Decodes at a price. The price lies in the step's memory, so one captured graph serves every price and prompt."""

    any_length = True

    def __init__(self, sessions: Sessions, shape: ModelShape, capacity: int) -> None:
        super().__init__(sessions, shape, capacity)
        self._price = device_tensor(np.zeros(1, np.float32), sessions.provider)
        self._prefill = PricedPrefill(sessions, shape, self.cache)

    def begin(self, tokens: Sequence[int], how: AnyDeployment, *, more: bool = False) -> np.ndarray:
        return self._prefill.read(tokens)

    def follow(self, how: AnyDeployment | None) -> Reading:
        assert how is None or isinstance(how, PriceDeployment)
        self._price.update_inplace(np.array([how.price if how else 0.0], np.float32))
        return Reading(how.share, how.share) if how else DENSE

    def _bind(self, width: Width) -> Call:
        call = Call(self._sessions.decode, width.graph_id, self._sessions.stream)
        self._bind_tokens(call, width)
        call.feed(contract.PRICE, self._price)
        call.write_to(contract.LOGITS, width.logits)
        call.write_to(contract.GREEDY_TOKENS, width.chosen)
        return call
