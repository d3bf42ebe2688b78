"""How a method of priced artifacts decodes: the prices of rows, and the price of a byte."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tda_export.evaluation.setting import Counted
from tda_export.graph import contract
from tda_export.graph.derive import artifact_spec, counted_rows, initializer_names, weight_table
from tda_export.graph.priced import priced_matrices
from tda_export.runtime.artifact import Artifact
from tda_export.runtime.deployment import PriceDeployment
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import PromptMask, bind_call, decode
from tda_export.runtime.priced import PricedPrefill, PricedStep
from tda_export.runtime.session import Sessions, device_tensor, initializer, open_session

NO_MASK = PromptMask({}, {})  # prefill of a priced artifact chooses no mask
RowPrices = Mapping[str, np.ndarray]


class PricedReader:
    """Reads contexts densely into one cache."""

    def __init__(self, sessions: Sessions, shape: contract.ModelShape, cache: KvCache) -> None:
        self._prefill = PricedPrefill(sessions, shape, cache)

    def read(self, tokens: Sequence[int]) -> tuple[np.ndarray, PromptMask]:
        """Append a context, and return its last token's logits, float32 [V]."""
        return self._prefill.read(tokens), NO_MASK


@dataclass(frozen=True)
class PricedSetting:
    """How a method decodes with a priced artifact; has the same interface as `setting.Setting`.

    `sessions`: decode has the method's row prices. `counting`: sessions whose decode also counts the rows that tokens
    read, with the same row prices. `held`: the row prices, kept alive since sessions on the CPU use them in place.
    """

    method: str
    artifact: Artifact
    sessions: Sessions
    deployment: PriceDeployment
    counting: Sessions
    budget: dict[str, Any] = field(default_factory=dict)
    masked: bool = True
    held: Mapping[str, Any] = field(default_factory=dict)
    per_token = True

    @property
    def shape(self) -> contract.ModelShape:
        """The model's sizes."""
        return self.artifact.shape

    def without_refresh(self) -> PricedSetting:
        """Return the same setting: nothing is refreshed."""
        return self

    def open_reader(self, cache: KvCache) -> Any:
        """Bind the prefill graph to a cache for any number of contexts."""
        return PricedReader(self.sessions, self.shape, cache)

    def read(self, tokens: Sequence[int], cache: KvCache, reader: Any = None) -> tuple[np.ndarray, PromptMask]:
        """Append a context densely."""
        return (reader or self.open_reader(cache)).read(tokens)

    def open_step(self, capacity: int) -> PricedStep:
        """Make a step that decodes one token after another, with its own cache of `capacity` tokens."""
        return PricedStep(self.sessions, self.shape, capacity)

    def decode(self, cache: KvCache, tokens: Sequence[int], mask: PromptMask | None) -> np.ndarray:
        """Append S given tokens at the method's price; without a mask, densely. Returns logits, float32 [S, V]."""
        price = self.deployment.price if mask is not None else 0.0
        given = {contract.PRICE: device_tensor(np.array([price], np.float32), self.sessions.provider)}
        return decode(self.sessions, cache, tokens, None, given)

    def density(self, mask: PromptMask) -> float:
        """Return 1: every token reads its own rows."""
        raise AssertionError("what a priced method reads is counted")

    def decode_counted(self, cache: KvCache, tokens: Sequence[int], mask: PromptMask, reader: Any = None) -> Counted:
        """Do the same as `decode`, and return what was read."""
        price = device_tensor(np.array([self.deployment.price], np.float32), self.sessions.provider)
        call = bind_call(self.counting.decode, cache, tokens, {contract.PRICE: price})
        call.allocate(contract.KEPT_ROWS, "cpu")
        outputs = call.run()
        cache.commit()
        kept = outputs[contract.KEPT_ROWS].numpy().mean(axis=1)  # of int64 [matrices, S]
        matrices = [self.artifact.matrices[name] for name in counted_matrices(self.artifact)]
        read, whole = defaultdict[str, float](float), defaultdict[str, int](int)  # bytes by group
        for matrix, rows in zip(matrices, kept.tolist(), strict=True):
            group = "head" if matrix.name == contract.HEAD else "ffn" if ".ffn." in matrix.name else "attention"
            read[group] += rows * matrix.row_bytes
            whole[group] += matrix.bytes
        layers = [(rows, m.rows) for m, rows in zip(matrices, kept.tolist(), strict=True) if m.name != contract.HEAD]
        density = sum(rows for rows, _ in layers) / sum(every for _, every in layers)
        ffn, attention, head = (read[group] / (whole[group] or 1) for group in ("ffn", "attention", "head"))
        logits = outputs[contract.LOGITS].numpy()[0]
        return Counted(logits, density, ffn, ffn, attention, head if whole["head"] else 1.0)


def counted_matrices(artifact: Artifact) -> list[str]:
    """Name the matrices whose rows have prices, in the order of the counts."""
    return priced_matrices(artifact_spec(artifact), weight_table(artifact))


def open_priced(
    method: str,
    artifact: Artifact,
    sessions: Sessions,
    deployment: PriceDeployment,
    budget: dict[str, Any],
    row_prices: RowPrices | None = None,
) -> PricedSetting:
    """Prepare a method on a priced artifact.

    Args:
        method: The method's name.
        artifact: The artifact on disk.
        sessions: The artifact's sessions.
        deployment: The price to decode at.
        budget: The requested budget, as plain data.
        row_prices: Other prices of rows, float32 [in] by matrix; missing ones are the artifact's own.
    """
    changed = {
        contract.row_price(name): initializer(np.ascontiguousarray(value, np.float32), sessions.provider, "float32")
        for name, value in (row_prices or {}).items()
    }
    own = sessions
    if changed:
        own = copy.copy(sessions)
        given = sessions.weights_of(artifact, contract.DECODE_FILE) | changed
        own.decode = open_session(
            artifact,
            contract.DECODE_FILE,
            sessions.provider,
            given,
            native=sessions.native,
            capture=sessions.captures,
            prepack=sessions.native,
        )
    model = counted_rows(artifact)
    names = initializer_names(model)
    weights = {name: value for name, value in (sessions.shared_weights | changed).items() if name in names}
    counting = copy.copy(sessions)
    counting.decode = open_session(artifact, model, sessions.provider, weights, native=sessions.native)
    return PricedSetting(method, artifact, own, deployment, counting, budget, held=changed)
