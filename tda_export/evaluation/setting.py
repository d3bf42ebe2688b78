"""How a method decodes, in one place: which prefill chooses the mask, by which thresholds, and what decode is given.

Every measurement reads contexts with `Setting.read` and continuations with `Setting.decode`, so that a method is
described here alone. A new method is a row of `METHODS`: how it checks its budget, and how it is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tda_export.calibration.budgets import AllocationRule, Budget, allocate_truncation, make_budget
from tda_export.calibration.file import read_calibration, thresholds_from
from tda_export.errors import TdaError, UsageError
from tda_export.graph import contract
from tda_export.graph.derive import artifact_method, derived_sessions, truncation_sessions
from tda_export.graph.method import griffin
from tda_export.runtime.artifact import Artifact
from tda_export.runtime.decode_step import DecodeStep
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import Prefill, PromptMask, bind_call, decode
from tda_export.runtime.session import Sessions, device_tensor


@dataclass(frozen=True)
class Request:
    """A method by name, and the budget that it was asked for: shares in [0, 1), None where not given."""

    method: str = "tda"
    sparsity: float | None = None
    cett: float | None = None
    allocation: AllocationRule | None = None

    @property
    def has_budget(self) -> bool:
        """Whether a budget was given."""
        return (self.sparsity, self.cett, self.allocation) != (None, None, None)


@dataclass(frozen=True)
class Setting:
    """How a method decodes.

    `sessions`: prefill chooses masks by the method. `thresholds`: float32 [L] in place of the artifact's own, or None.
    `masked`: False decodes with every neuron, through the same graph. `method` and `budget` describe it as plain data.
    """

    method: str
    shape: contract.ModelShape
    sessions: Sessions
    thresholds: np.ndarray | None = None
    masked: bool = True
    budget: dict[str, Any] = field(default_factory=dict)

    def read(
        self, tokens: Sequence[int], cache: KvCache, reader: Prefill | None = None
    ) -> tuple[np.ndarray, PromptMask]:
        """Append a context densely.

        Args:
            tokens: The context, at least one.
            cache: Where to.
            reader: Of `open_reader` on this cache, where many contexts are read one after another: it is bound once.

        Returns:
            The last token's logits, float32 [V], and the mask that the context gives.
        """
        return (reader or self.open_reader(cache)).read(tokens, self.thresholds)

    def open_reader(self, cache: KvCache) -> Prefill:
        """Bind the prefill graph to a cache for any number of contexts; each mask is written over by the next."""
        return Prefill(self.sessions, self.shape, cache)

    def open_step(self, capacity: int) -> DecodeStep:
        """Bind decoding of one token after another, in a cache of its own of that many tokens."""
        return DecodeStep(self.sessions, self.shape, capacity)

    def decode(self, cache: KvCache, tokens: Sequence[int], mask: PromptMask | None) -> np.ndarray:
        """Append S given tokens as the method decodes under a context's mask; without a mask, densely.

        Returns:
            Logits, float32 [S, V].
        """
        return decode(self.sessions, cache, tokens, mask if self.masked else None)

    def density(self, mask: PromptMask) -> float:
        """Return the share of neurons that decode reads under a mask."""
        layers = self.shape.num_layers
        return mask.count(layers) / (layers * self.shape.ffn_size) if self.masked else 1.0

    @property
    def per_token(self) -> bool:
        """Whether every token keeps neurons of its own, so that `density` is known only of decoded ones."""
        return False

    def decode_counted(self, cache: KvCache, tokens: Sequence[int], mask: PromptMask) -> tuple[np.ndarray, float]:
        """Do as `decode`, and say what share of neurons its tokens kept on average."""
        return self.decode(cache, tokens, mask), self.density(mask)

    def ffn_share(self, density: float) -> float:
        """Return the share of the FFN's bytes that a token reads when it keeps that share of neurons."""
        return density


@dataclass(frozen=True)
class TruncationSetting(Setting):
    """Threshold truncation: each token drops the neurons with r_i(t) under `thresholds`, and no mask matters.

    Decode is the graph of `graph/truncation.py`. It reads every gate row and up row, and the down rows of kept
    neurons.
    """

    def decode(self, cache: KvCache, tokens: Sequence[int], mask: PromptMask | None) -> np.ndarray:
        return (
            decode(self.sessions, cache, tokens, None) if mask is None else self.decode_counted(cache, tokens, mask)[0]
        )

    @property
    def per_token(self) -> bool:
        return True

    def density(self, mask: PromptMask) -> float:
        raise TdaError("Threshold truncation keeps other neurons for every token. Count them with decode_counted.")

    def open_step(self, capacity: int) -> DecodeStep:
        raise UsageError("Threshold truncation is measured on given tokens, and does not generate. Use another method.")

    def decode_counted(self, cache: KvCache, tokens: Sequence[int], mask: PromptMask) -> tuple[np.ndarray, float]:
        assert self.thresholds is not None
        thresholds = device_tensor(self.thresholds, self.sessions.provider)
        call = bind_call(self.sessions.decode, cache, tokens, {contract.THRESHOLDS: thresholds})
        call.allocate(contract.KEPT_NEURONS, "cpu")
        outputs = call.run()
        cache.commit()
        kept = outputs[contract.KEPT_NEURONS].numpy()  # int64 [L, S]
        return outputs[contract.LOGITS].numpy()[0], float(kept.mean()) / self.shape.ffn_size

    def ffn_share(self, density: float) -> float:
        return (2.0 + density) / 3.0


def check_request(artifact: Artifact, request: Request) -> None:
    """Refuse what cannot be measured with an artifact, before any session is opened.

    Raises:
        UsageError: The method is not known, its budget is missing, incomplete or not one that it takes, or the
            artifact does not fit it.
    """
    if request.method not in METHODS:
        raise UsageError(f"Method {request.method!r} is not known. Use {', '.join(METHODS)}.")
    METHODS[request.method].check(artifact, request)


def open_setting(
    artifact: Artifact,
    sessions: Sessions,
    method: str,
    *,
    sparsity: float | None = None,
    cett: float | None = None,
    allocation: AllocationRule | None = None,
) -> Setting:
    """Prepare a method on an artifact.

    Args:
        artifact: On disk.
        sessions: Its own; the prefill of another method is derived from them, and shares their weights.
        method: A key of `METHODS`.
        sparsity: Share of FFN bytes that decode shall not read.
        cett: Mean CETT that each layer may lose.
        allocation: How a sparsity is spread over the layers.

    Raises:
        UsageError: See `check_request`.
        TdaError: The artifact's calibration cannot be read, or the derived graph cannot be loaded.
    """
    request = Request(method, sparsity, cett, allocation)
    check_request(artifact, request)
    return METHODS[method].open(artifact, sessions, request)


@dataclass(frozen=True)
class MethodEntry:
    """A row of `METHODS`."""

    check: Callable[[Artifact, Request], None]
    open: Callable[[Artifact, Sessions, Request], Setting]


def artifact_thresholds(artifact: Artifact, budget: Budget) -> list[float]:
    """Choose L thresholds for a budget from an artifact's own calibration.

    Raises:
        UsageError: It carries none.
        TdaError: It cannot be read.
    """
    if contract.CALIBRATION_FILE not in artifact.manifest["files"]:
        raise UsageError(
            f"{artifact.folder} carries no calibration, so its budget is fixed. Leave --cett and --sparsity out."
        )
    return thresholds_from(artifact.file(contract.CALIBRATION_FILE), budget)


def truncation_thresholds(artifact: Artifact, budget: Budget) -> list[float]:
    """Choose L thresholds of r_i(t) for threshold truncation from an artifact's own calibration.

    Raises:
        UsageError: It carries none or that of the prompt estimator, or the budget is more than truncation saves.
        TdaError: It cannot be read.
    """
    if contract.CALIBRATION_FILE not in artifact.manifest["files"]:
        raise UsageError(
            f"{artifact.folder} carries no calibration, which --method tt takes its thresholds from. Calibrate with "
            "'tda-export calibrate --estimator token', and build with that."
        )
    calibration = read_calibration(artifact.file(contract.CALIBRATION_FILE))
    return allocate_truncation(budget, calibration.sums, calibration.grid).thresholds


def _check_tda(artifact: Artifact, request: Request) -> None:
    own = artifact_method(artifact)
    if own.selection != "threshold":
        raise UsageError(
            f"{artifact.folder} was built with --method {own.name}, so tda cannot be measured with it. "
            "Give an artifact of --method tda."
        )
    if request.has_budget:
        _budget(request)


def _open_tda(artifact: Artifact, sessions: Sessions, request: Request) -> Setting:
    if not request.has_budget:
        return Setting("tda", artifact.shape, sessions, budget=dict(artifact.manifest["budget"]))
    budget = _budget(request)
    thresholds = np.asarray(artifact_thresholds(artifact, budget), np.float32)  # [L]
    return Setting("tda", artifact.shape, sessions, thresholds, budget=budget.describe())


def _budget(request: Request) -> Budget:
    return make_budget(request.cett, request.sparsity, request.allocation)


def _check_griffin(artifact: Artifact, request: Request) -> None:
    if request.sparsity is None or request.cett is not None or request.allocation is not None:
        raise UsageError("--method griffin takes --sparsity, and no other budget.")
    Budget(sparsity=request.sparsity)  # its range


def _open_griffin(artifact: Artifact, sessions: Sessions, request: Request) -> Setting:
    assert request.sparsity is not None
    derived = derived_sessions(artifact, sessions, griffin(request.sparsity))
    return Setting("griffin", artifact.shape, derived, budget={"sparsity": request.sparsity})


def _check_tt(artifact: Artifact, request: Request) -> None:
    if not request.has_budget:
        raise UsageError("--method tt takes a budget of its own. Give --cett, or --sparsity up to 0.333.")
    truncation_thresholds(artifact, _budget(request))


def _open_tt(artifact: Artifact, sessions: Sessions, request: Request) -> Setting:
    budget = _budget(request)
    thresholds = np.asarray(truncation_thresholds(artifact, budget), np.float32)  # [L]
    derived = truncation_sessions(artifact, sessions)
    return TruncationSetting("tt", artifact.shape, derived, thresholds, budget=budget.describe())


def _check_dense(artifact: Artifact, request: Request) -> None:
    if request.has_budget:
        raise UsageError("--method dense reads every neuron, so a budget means nothing. Leave one of them out.")


def _open_dense(artifact: Artifact, sessions: Sessions, request: Request) -> Setting:
    return Setting("dense", artifact.shape, sessions, masked=False)


METHODS = {
    "tda": MethodEntry(_check_tda, _open_tda),
    "griffin": MethodEntry(_check_griffin, _open_griffin),
    "tt": MethodEntry(_check_tt, _open_tt),
    "dense": MethodEntry(_check_dense, _open_dense),
}
