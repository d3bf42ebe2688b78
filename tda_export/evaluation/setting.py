"""How a method decodes: the prefill graph that chooses the prompt mask, its thresholds, and the inputs of decode.

Every measurement reads contexts with `Setting.read` and continuations with `Setting.decode`, so that a method's
behaviour is defined only here. `methods.py` makes settings by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tda_export.errors import TdaError, UsageError
from tda_export.ffn_share import truncation_share, two_level_share
from tda_export.graph import contract
from tda_export.runtime.decode_step import DecodeStep
from tda_export.runtime.deployment import NO_REFRESH, Deployment
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import Prefill, PromptMask, bind_call, decode
from tda_export.runtime.session import Sessions, device_tensor


@dataclass(frozen=True)
class Counted:
    """The result of decoding given tokens: logits float32 [S, V], the share of neurons in the prompt mask, the share of
    FFN bytes that a token read without refreshes, the mean share with refreshes, the share of attention's linears, and
    the head's."""

    logits: np.ndarray
    density: float
    sparse_share: float
    ffn_share: float
    attention_share: float = 1.0
    head_share: float = 1.0

    @property
    def refresh_share(self) -> float:
        """How much more is read because of refreshes: each dense token also reads what a sparse one skips."""
        return self.ffn_share - self.sparse_share


@dataclass(frozen=True)
class Setting:
    """How a method decodes.

    `sessions`: their prefill chooses prompt masks by the method. `deployment`: thresholds, prior, refresh. `counting`:
    sessions that also count the neurons that tokens compute, where token thresholds or ReLU make these differ from the
    mask. `masked`: False decodes with every neuron, with the same graph. `method` and `budget` describe it as plain
    data.
    """

    method: str
    shape: contract.ModelShape
    sessions: Sessions
    deployment: Deployment
    counting: Sessions | None = None
    masked: bool = True
    budget: dict[str, Any] = field(default_factory=dict)

    def without_refresh(self) -> Setting:
        """Return the same setting without refreshes."""
        budget = {name: value for name, value in self.budget.items() if name != "refresh"}
        return replace(self, deployment=self.deployment.with_refresh(NO_REFRESH), budget=budget)

    def read(self, tokens: Sequence[int], cache: KvCache, reader: Any = None) -> tuple[np.ndarray, PromptMask]:
        """Append a context densely.

        Args:
            tokens: The context, at least one.
            cache: The cache to append to.
            reader: The result of `open_reader` on this cache, bound once for many contexts that are read one after
                another.

        Returns:
            The last token's logits, float32 [V], and the context's prompt mask.
        """
        how = self.deployment
        return (reader or self.open_reader(cache)).read(tokens, how.thresholds, prior=how.prior)

    def open_reader(self, cache: KvCache) -> Any:
        """Bind the prefill graph to a cache for any number of contexts; the next context overwrites each mask."""
        return Prefill(self.sessions, self.shape, cache)

    def open_step(self, capacity: int) -> DecodeStep:
        """Make a step that decodes one token after another, with its own cache of `capacity` tokens."""
        return DecodeStep(self.sessions, self.shape, capacity)

    def decode(self, cache: KvCache, tokens: Sequence[int], mask: PromptMask | None) -> np.ndarray:
        """Append S given tokens as the method decodes under a context's mask; without a mask, densely.

        Returns:
            Logits, float32 [S, V].
        """
        if mask is None or not self.masked:
            return decode(self.sessions, cache, tokens, None)
        return decode(self.sessions, cache, tokens, self._given(mask), self._token_thresholds())

    def density(self, mask: PromptMask) -> float:
        """Return the share of neurons in a prompt mask."""
        return float(mask.densities(self.shape.num_layers, self.shape.ffn_size).mean()) if self.masked else 1.0

    @property
    def per_token(self) -> bool:
        """Whether every token keeps its own neurons, so that the bytes read are known only for decoded tokens."""
        return self.counting is not None

    def decode_counted(self, cache: KvCache, tokens: Sequence[int], mask: PromptMask, reader: Any = None) -> Counted:
        """Do the same as `decode`, with the method's refreshes, and return what was read.

        After every N tokens a refresh reads these N densely, which gives the logits after the last of them and the
        prompt mask for the next tokens.

        Args:
            cache: Holds the context.
            tokens: S token ids.
            mask: The context's prompt mask.
            reader: The reader that read the context, needed for refreshes: it holds the statistics.
        """
        refresh = self.deployment.refresh if self.masked else NO_REFRESH
        if not refresh.tokens:
            return self._counted(cache, tokens, mask)
        assert reader is not None
        pieces: list[Counted] = []
        logits: list[np.ndarray] = []
        weights: list[int] = []
        for start in range(0, len(tokens), refresh.tokens):
            piece = tokens[start : start + refresh.tokens]
            whole = len(piece) == refresh.tokens
            sparse = piece[:-1] if whole else piece
            length = cache.length
            counted = self._counted(cache, sparse, mask)
            pieces.append(counted)
            weights.append(len(sparse))
            logits.append(counted.logits)
            if whole:
                cache.truncate(length)
                last, mask = reader.read(piece, self.deployment.thresholds, decay=refresh.decay)
                logits.append(last[None])
        total = sum(weights)
        density, share = (
            sum(weight * value for weight, value in zip(weights, values, strict=True)) / total
            for values in ([piece.density for piece in pieces], [piece.sparse_share for piece in pieces])
        )
        dense = len(tokens) - total
        return Counted(np.concatenate(logits), density, share, (share * total + dense) / len(tokens))

    def _counted(self, cache: KvCache, tokens: Sequence[int], mask: PromptMask) -> Counted:
        if self.counting is None:
            density = self.density(mask)
            return Counted(self.decode(cache, tokens, mask), density, density, density)
        masked = self._given(mask).inputs | self._token_thresholds()
        inputs = masked if self.masked else self.counting.dense_inputs
        call = bind_call(self.counting.decode, cache, tokens, inputs)
        call.allocate(contract.KEPT_NEURONS, "cpu")
        outputs = call.run()
        cache.commit()
        kept = float(outputs[contract.KEPT_NEURONS].numpy().mean()) / self.shape.ffn_size
        density = self.density(mask)
        share = two_level_share(density, kept, self.deployment.ffn_matrices)
        return Counted(outputs[contract.LOGITS].numpy()[0], density, share, share)

    def _given(self, mask: PromptMask) -> PromptMask:
        return mask if self.deployment.tail_mean else mask.without_tail()

    def _token_thresholds(self) -> dict[str, Any]:
        if not self.sessions.two_levels:
            return {}
        values = self.deployment.token_thresholds
        return {contract.TOKEN_THRESHOLDS: device_tensor(values, self.sessions.provider)}


@dataclass(frozen=True)
class TruncationSetting(Setting):
    """Threshold truncation: each token drops the neurons with r_i(t) below `thresholds`, and there is no prompt mask.

    Decode is the graph of `graph/truncation.py`. It reads every gate row and up row, and the down rows of kept
    neurons.
    """

    def decode(self, cache: KvCache, tokens: Sequence[int], mask: PromptMask | None) -> np.ndarray:
        return decode(self.sessions, cache, tokens, None) if mask is None else self._counted(cache, tokens, mask).logits

    @property
    def per_token(self) -> bool:
        return True

    def density(self, mask: PromptMask) -> float:
        raise TdaError("Threshold truncation keeps other neurons for every token. Count them with decode_counted.")

    def open_step(self, capacity: int) -> DecodeStep:
        raise UsageError("Threshold truncation is measured on given tokens, and does not generate. Use another method.")

    def _counted(self, cache: KvCache, tokens: Sequence[int], mask: PromptMask) -> Counted:
        assert self.deployment.thresholds is not None
        thresholds = device_tensor(self.deployment.thresholds, self.sessions.provider)
        call = bind_call(self.sessions.decode, cache, tokens, {contract.THRESHOLDS: thresholds})
        call.allocate(contract.KEPT_NEURONS, "cpu")
        outputs = call.run()
        cache.commit()
        kept = float(outputs[contract.KEPT_NEURONS].numpy().mean()) / self.shape.ffn_size  # of int64 [L, S]
        share = truncation_share(kept, self.deployment.ffn_matrices)
        return Counted(outputs[contract.LOGITS].numpy()[0], kept, share, share)
