"""The methods by name: which budgets they accept, and how their settings are made from an artifact.

A new method is a row of `METHODS`: how it checks its budget, and how it is opened. Methods of priced artifacts are in
`priced_methods.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tda_export.calibration.budgets import Budget, allocate_truncation
from tda_export.calibration.file import Calibration
from tda_export.deployments import deployed, own_calibration
from tda_export.errors import UsageError
from tda_export.evaluation.priced_methods import (
    check_priced,
    check_threshold,
    open_priced_dense,
    open_priced_rows,
    open_threshold,
)
from tda_export.evaluation.priced_setting import PricedSetting
from tda_export.evaluation.requests import Request
from tda_export.evaluation.setting import Setting, TruncationSetting
from tda_export.graph.derive import (
    artifact_method,
    artifact_spec,
    counting_sessions,
    derived_sessions,
    truncation_sessions,
)
from tda_export.graph.method import griffin
from tda_export.runtime.artifact import Artifact
from tda_export.runtime.deployment import Deployment, one_level
from tda_export.runtime.session import Sessions

PAPER_CETT = 0.2
ROW_METHODS = ("priced", "teal", "wina")  # methods that may drop rows of all linears

AnySetting = Setting | PricedSetting


def check_request(artifact: Artifact, request: Request) -> None:
    """Refuse requests that an artifact cannot serve, before any session is opened.

    Raises:
        UsageError: The method is unknown, its budget is missing, incomplete or not accepted, or the artifact does not
            fit the method.
    """
    entry = _entry(artifact, request)
    name = method_name(artifact, request)
    for option, value in (("--parts", request.parts), ("--densities", request.densities)):
        if value is not None and name not in ROW_METHODS:
            raise UsageError(
                f"{option} has no effect with --method {name}, but with {', '.join(ROW_METHODS)}. Leave it out."
            )
    entry.check(artifact, request)


def method_name(artifact: Artifact, request: Request) -> str:
    """Return the requested method: the artifact's own unless another is named."""
    return request.method or str(artifact.manifest["method"]["name"])


def _entry(artifact: Artifact, request: Request) -> MethodEntry:
    name = method_name(artifact, request)
    if name not in METHODS:
        raise UsageError(f"Method {name!r} is not known. Use {', '.join(METHODS)}.")
    entries = METHODS[name]
    if artifact.layout not in entries:
        serving = [other for other, layouts in METHODS.items() if artifact.layout in layouts]
        needed = {"indexed": "tda", "priced": "priced"}[next(iter(entries))]
        raise UsageError(
            f"{artifact.folder} has the layout {artifact.layout}, which runs {', '.join(serving)} and not {name}. "
            f"Build an artifact for it with 'tda-export build MODEL --method {needed}'."
        )
    return entries[artifact.layout]


def open_setting(artifact: Artifact, sessions: Sessions, request: Request) -> AnySetting:
    """Prepare a method on an artifact.

    Args:
        artifact: The artifact on disk.
        sessions: The artifact's sessions; graphs of other methods are derived from them and share their weights.
        request: The method and its budget.

    Raises:
        UsageError: See `check_request`.
        TdaError: The artifact's calibration cannot be read, or the derived graph cannot be loaded.
    """
    check_request(artifact, request)
    return _entry(artifact, request).open(artifact, sessions, request)


@dataclass(frozen=True)
class MethodEntry:
    """A row of `METHODS`."""

    check: Callable[[Artifact, Request], None]
    open: Callable[[Artifact, Sessions, Request], AnySetting]


def _check_tda(artifact: Artifact, request: Request) -> None:
    _require_thresholds(artifact, request)
    _refuse_price(request)
    if request.has_budget:
        request.budget()
    elif request.calibration is not None:
        raise UsageError("--calibration has no effect without a budget. Give --sparsity, --max-kl or --cett too.")


def _require_thresholds(artifact: Artifact, request: Request) -> None:
    own = artifact_method(artifact)
    if own.selection != "threshold":
        raise UsageError(
            f"{artifact.folder} was built with --method {own.name}, so {request.method} cannot be measured with it. "
            "Give an artifact of --method tda."
        )


def _open_tda(artifact: Artifact, sessions: Sessions, request: Request) -> Setting:
    described = request.budget().describe() if request.has_budget else dict(artifact.manifest["budget"])
    deployment = deployed(artifact, request)
    assert isinstance(deployment, Deployment)
    if deployment.refresh.tokens:
        described |= {"refresh": deployment.refresh.tokens}
    counting = _counting(artifact, sessions, bool(deployment.token_thresholds.any()))
    return Setting("tda", artifact.shape, sessions, deployment, counting, budget=described)


def _counting(artifact: Artifact, sessions: Sessions, skips: bool = False) -> Sessions | None:
    """Return sessions that count the neurons that tokens read, where these differ from the prompt mask's; rows of
    ReLU's zeros are never read."""
    skips = skips or artifact_spec(artifact).activation == "relu"
    return counting_sessions(artifact, sessions) if skips and sessions.two_levels else None


def _refuse_price(request: Request) -> None:
    if request.price is not None:
        raise UsageError("--price needs an artifact of --method priced. Give --sparsity, --max-kl or --cett.")


def _check_paper(artifact: Artifact, request: Request) -> None:
    _refuse_price(request)
    _require_thresholds(artifact, request)
    if (request.sparsity, request.allocation, request.max_kl, request.refresh) != (None, None, None, None):
        raise UsageError(f"--method paper takes --cett ({PAPER_CETT} unless given), and nothing else.")
    _token_calibration(artifact, request, "--method paper")


def _token_calibration(artifact: Artifact, request: Request, what: str) -> Calibration:
    calibration = own_calibration(artifact, request.calibration)
    if calibration.sums.token_density.shape[1] == 0:
        raise UsageError(
            f"{what} takes thresholds of single tokens, and this calibration is of prompts. Make one with "
            "'tda-export calibrate --method tda --estimator token --curves-only' and give it with --calibration."
        )
    return calibration


def _open_paper(artifact: Artifact, sessions: Sessions, request: Request) -> Setting:
    budget = Budget(cett=PAPER_CETT if request.cett is None else request.cett)
    thresholds = _token_calibration(artifact, request, "--method paper").allocate(budget).thresholds
    deployment = one_level(thresholds, artifact.shape.num_layers, artifact.ffn_matrices)
    counting = _counting(artifact, sessions)
    return Setting("paper", artifact.shape, sessions, deployment, counting, budget=budget.describe())


def _check_griffin(artifact: Artifact, request: Request) -> None:
    _refuse_price(request)
    others = (request.cett, request.allocation, request.max_kl, request.refresh, request.calibration)
    if request.sparsity is None or any(other is not None for other in others):
        raise UsageError("--method griffin takes --sparsity, and no other budget.")
    Budget(sparsity=request.sparsity, allocation="uniform")  # checks its range


def _open_griffin(artifact: Artifact, sessions: Sessions, request: Request) -> Setting:
    assert request.sparsity is not None
    derived = derived_sessions(artifact, sessions, griffin(request.sparsity))
    deployment = one_level(None, artifact.shape.num_layers, artifact.ffn_matrices)
    budget = {"sparsity": request.sparsity}
    return Setting("griffin", artifact.shape, derived, deployment, _counting(artifact, derived), budget=budget)


def _check_tt(artifact: Artifact, request: Request) -> None:
    _refuse_price(request)
    if (request.cett is None) == (request.sparsity is None):
        raise UsageError("--method tt needs a budget. Give --cett, or --sparsity up to 0.333.")
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
    return allocate_truncation(budget, sums, grid, ffn_matrices=calibration.ffn_matrices).thresholds


def _open_tt(artifact: Artifact, sessions: Sessions, request: Request) -> Setting:
    deployment = one_level(_truncation_thresholds(artifact, request), artifact.shape.num_layers, artifact.ffn_matrices)
    derived = truncation_sessions(artifact, sessions)
    budget = _truncation_budget(request)
    described = {"cett": budget.cett} if budget.cett is not None else {"sparsity": budget.sparsity}
    return TruncationSetting("tt", artifact.shape, derived, deployment, budget=described)


def _check_dense(artifact: Artifact, request: Request) -> None:
    if request.has_budget or request.refresh is not None or request.calibration is not None:
        raise UsageError("--method dense reads every neuron, so a budget has no effect. Leave one of them out.")


def _open_dense(artifact: Artifact, sessions: Sessions, request: Request) -> Setting:
    deployment = one_level(None, artifact.shape.num_layers, artifact.ffn_matrices)
    return Setting("dense", artifact.shape, sessions, deployment, _counting(artifact, sessions), masked=False)


# Entries by method and by artifact layout.
METHODS: dict[str, dict[str, MethodEntry]] = {
    "priced": {"priced": MethodEntry(check_priced, open_priced_rows)},
    "teal": {"priced": MethodEntry(check_threshold, open_threshold)},
    "wina": {"priced": MethodEntry(check_threshold, open_threshold)},
    "tda": {"indexed": MethodEntry(_check_tda, _open_tda)},
    "paper": {"indexed": MethodEntry(_check_paper, _open_paper)},
    "griffin": {"indexed": MethodEntry(_check_griffin, _open_griffin)},
    "tt": {"indexed": MethodEntry(_check_tt, _open_tt)},
    "dense": {
        "indexed": MethodEntry(_check_dense, _open_dense),
        "priced": MethodEntry(_check_dense, open_priced_dense),
    },
}
