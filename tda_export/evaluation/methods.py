"""The methods by name: what budgets they take, and how their settings are made from an artifact.

A new method is a row of `METHODS`: how it checks its budget, and how it is opened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tda_export.calibration.budgets import Allocation, AllocationRule, Budget, allocate_truncation, make_budget
from tda_export.calibration.file import Calibration, read_calibration
from tda_export.errors import UsageError
from tda_export.evaluation.setting import Setting, TruncationSetting
from tda_export.graph import contract
from tda_export.graph.derive import (
    artifact_method,
    artifact_spec,
    counting_sessions,
    derived_sessions,
    truncation_sessions,
)
from tda_export.graph.method import griffin
from tda_export.runtime.artifact import Artifact
from tda_export.runtime.deployment import Deployment, Refresh, one_level
from tda_export.runtime.session import Sessions

PAPER_CETT = 0.2


@dataclass(frozen=True)
class Request:
    """A method by name, and the budget that it was asked for: None where not given.

    `sparsity` and `cett` are shares in [0, 1), `max_kl` is nats a token. `refresh`: another refresh than the artifact's
    own. `calibration`: a calibration file in place of the artifact's own.
    """

    method: str = "tda"
    sparsity: float | None = None
    cett: float | None = None
    allocation: AllocationRule | None = None
    max_kl: float | None = None
    refresh: Refresh | None = None
    calibration: Path | None = None

    @property
    def has_budget(self) -> bool:
        """Whether a budget was given."""
        return (self.sparsity, self.cett, self.allocation, self.max_kl) != (None, None, None, None)


def check_request(artifact: Artifact, request: Request) -> None:
    """Refuse what cannot be measured with an artifact, before any session is opened.

    Raises:
        UsageError: The method is not known, its budget is missing, incomplete or not one that it takes, or the
            artifact does not fit it.
    """
    if request.method not in METHODS:
        raise UsageError(f"Method {request.method!r} is not known. Use {', '.join(METHODS)}.")
    METHODS[request.method].check(artifact, request)


def open_setting(artifact: Artifact, sessions: Sessions, request: Request) -> Setting:
    """Prepare a method on an artifact.

    Args:
        artifact: On disk.
        sessions: Its own; graphs of other methods are derived from them, and share their weights.
        request: Method and budget.

    Raises:
        UsageError: See `check_request`.
        TdaError: The artifact's calibration cannot be read, or the derived graph cannot be loaded.
    """
    check_request(artifact, request)
    return METHODS[request.method].open(artifact, sessions, request)


@dataclass(frozen=True)
class MethodEntry:
    """A row of `METHODS`."""

    check: Callable[[Artifact, Request], None]
    open: Callable[[Artifact, Sessions, Request], Setting]


def budget_deployment(
    artifact: Artifact, budget: Budget, calibration: Path | None = None, refresh: Refresh | None = None
) -> Deployment:
    """Choose how decode drops neurons for a budget, from an artifact's own calibration or another of the same model.

    A sparsity is that of all tokens, refreshes included. Without `refresh` the artifact's own.

    Raises:
        UsageError: There is none, it is of another model, or the artifact was not built for what the budget needs.
        TdaError: It cannot be read.
    """
    refresh = refresh or artifact.deployment.refresh
    allocation = _calibration(artifact, calibration).allocate(budget, refresh.tokens)
    if not allocation.token_thresholds:
        # A tail mean that was asked for stays; the one that comes with an allocation by KL goes with it.
        tail_mean = not Budget(**artifact.manifest["budget"]).by_kl
        deployment = one_level(allocation.thresholds, artifact.shape.num_layers, artifact.ffn_matrices)
        return replace(deployment, tail_mean=tail_mean, refresh=refresh)
    method = artifact_method(artifact)
    if allocation.prior_tokens != artifact.manifest["prior_tokens"] or method.tail != "mean" or not method.two_levels:
        raise UsageError(
            f"{artifact.folder} was built without the prior and the tail mean that an allocation by KL is calibrated "
            "with. Build it again with --allocation kl, or ask for --allocation uniform."
        )
    return path_deployment(allocation).with_refresh(refresh)


def path_deployment(allocation: Allocation) -> Deployment:
    """Return the deployment of a point of the KL path, without refreshes."""
    mask, token = np.asarray(allocation.density), np.asarray(allocation.token_density)
    return Deployment(
        np.asarray(allocation.thresholds, np.float32),
        np.asarray(allocation.token_thresholds, np.float32),
        survivors=(token / np.maximum(mask, 1e-9)).astype(np.float32),
        ffn_matrices=allocation.ffn_matrices,
    )


def _calibration(artifact: Artifact, other: Path | None) -> Calibration:
    if other is not None:
        calibration = read_calibration(other)
        if calibration.model_fingerprint != artifact.manifest["model"]["fingerprint"]:
            raise UsageError(
                f"{other} was calibrated on another model ({calibration.provenance['model']['name']}) than "
                f"{artifact.folder}. Give one of the same model with --calibration."
            )
        return calibration
    if contract.CALIBRATION_FILE not in artifact.manifest["files"]:
        raise UsageError(
            f"{artifact.folder} carries no calibration, so its budget is fixed. Leave the budget out; eval also takes "
            "another file with --calibration."
        )
    return read_calibration(artifact.file(contract.CALIBRATION_FILE))


def _check_tda(artifact: Artifact, request: Request) -> None:
    _require_thresholds(artifact, request)
    if request.has_budget:
        _budget(request)
    elif request.calibration is not None:
        raise UsageError("--calibration is what a budget is chosen from. Give --sparsity, --max-kl or --cett too.")


def _require_thresholds(artifact: Artifact, request: Request) -> None:
    own = artifact_method(artifact)
    if own.selection != "threshold":
        raise UsageError(
            f"{artifact.folder} was built with --method {own.name}, so {request.method} cannot be measured with it. "
            "Give an artifact of --method tda."
        )


def _open_tda(artifact: Artifact, sessions: Sessions, request: Request) -> Setting:
    if request.has_budget:
        budget = _budget(request)
        deployment = budget_deployment(artifact, budget, request.calibration, request.refresh)
        described = budget.describe()
    else:
        deployment, described = artifact.deployment, dict(artifact.manifest["budget"])
    if request.refresh is not None:
        deployment = deployment.with_refresh(request.refresh)
    if deployment.refresh.tokens:
        described |= {"refresh": deployment.refresh.tokens}
    counting = _counting(artifact, sessions, bool(deployment.token_thresholds.any()))
    return Setting("tda", artifact.shape, sessions, deployment, counting, budget=described)


def _counting(artifact: Artifact, sessions: Sessions, skips: bool = False) -> Sessions | None:
    """Sessions that count what tokens read, where that is not what the mask says; ReLU's zeros are never read."""
    skips = skips or artifact_spec(artifact).activation == "relu"
    return counting_sessions(artifact, sessions) if skips and sessions.two_levels else None


def _budget(request: Request) -> Budget:
    return make_budget(request.cett, request.sparsity, request.allocation, request.max_kl)


def _check_paper(artifact: Artifact, request: Request) -> None:
    _require_thresholds(artifact, request)
    if (request.sparsity, request.allocation, request.max_kl, request.refresh) != (None, None, None, None):
        raise UsageError(f"--method paper takes --cett ({PAPER_CETT} unless given), and nothing else.")
    _token_calibration(artifact, request, "--method paper")


def _token_calibration(artifact: Artifact, request: Request, what: str) -> Calibration:
    calibration = _calibration(artifact, request.calibration)
    if calibration.sums.token_density.shape[1] == 0:
        raise UsageError(
            f"{what} takes thresholds of single tokens, and this calibration is of prompts. Make one with "
            "'tda-export calibrate --method tda --estimator token --curves-only' and give it with --calibration."
        )
    return calibration


def _open_paper(artifact: Artifact, sessions: Sessions, request: Request) -> Setting:
    budget = Budget(cett=PAPER_CETT if request.cett is None else request.cett)
    thresholds = _token_calibration(artifact, request, "--method paper").allocate(budget).thresholds
    deployment = one_level(thresholds, artifact.shape.num_layers)
    counting = _counting(artifact, sessions)
    return Setting("paper", artifact.shape, sessions, deployment, counting, budget=budget.describe())


def _check_griffin(artifact: Artifact, request: Request) -> None:
    others = (request.cett, request.allocation, request.max_kl, request.refresh, request.calibration)
    if request.sparsity is None or any(other is not None for other in others):
        raise UsageError("--method griffin takes --sparsity, and no other budget.")
    Budget(sparsity=request.sparsity, allocation="uniform")  # its range


def _open_griffin(artifact: Artifact, sessions: Sessions, request: Request) -> Setting:
    assert request.sparsity is not None
    derived = derived_sessions(artifact, sessions, griffin(request.sparsity))
    deployment = one_level(None, artifact.shape.num_layers)
    budget = {"sparsity": request.sparsity}
    return Setting("griffin", artifact.shape, derived, deployment, _counting(artifact, derived), budget=budget)


def _check_tt(artifact: Artifact, request: Request) -> None:
    if (request.cett is None) == (request.sparsity is None):
        raise UsageError("--method tt takes a budget of its own. Give --cett, or --sparsity up to 0.333.")
    if (request.allocation, request.max_kl, request.refresh) != (None, None, None):
        raise UsageError("--method tt takes --cett or --sparsity, and nothing else.")
    _truncation_thresholds(artifact, request)


def _truncation_budget(request: Request) -> Budget:
    if request.cett is not None:
        return Budget(cett=request.cett)
    return Budget(sparsity=request.sparsity, allocation="uniform")


def _truncation_thresholds(artifact: Artifact, request: Request) -> list[float]:
    calibration = _token_calibration(artifact, request, "--method tt")
    budget, sums, grid = _truncation_budget(request), calibration.sums, calibration.grid
    return allocate_truncation(budget, sums, grid, calibration.ffn_matrices).thresholds


def _open_tt(artifact: Artifact, sessions: Sessions, request: Request) -> Setting:
    deployment = one_level(_truncation_thresholds(artifact, request), artifact.shape.num_layers, artifact.ffn_matrices)
    derived = truncation_sessions(artifact, sessions)
    budget = _truncation_budget(request)
    described = {"cett": budget.cett} if budget.cett is not None else {"sparsity": budget.sparsity}
    return TruncationSetting("tt", artifact.shape, derived, deployment, budget=described)


def _check_dense(artifact: Artifact, request: Request) -> None:
    if request.has_budget or request.refresh is not None or request.calibration is not None:
        raise UsageError("--method dense reads every neuron, so a budget means nothing. Leave one of them out.")


def _open_dense(artifact: Artifact, sessions: Sessions, request: Request) -> Setting:
    deployment, counting = one_level(None, artifact.shape.num_layers), _counting(artifact, sessions)
    return Setting("dense", artifact.shape, sessions, deployment, counting, masked=False)


METHODS = {
    "tda": MethodEntry(_check_tda, _open_tda),
    "paper": MethodEntry(_check_paper, _open_paper),
    "griffin": MethodEntry(_check_griffin, _open_griffin),
    "tt": MethodEntry(_check_tt, _open_tt),
    "dense": MethodEntry(_check_dense, _open_dense),
}
