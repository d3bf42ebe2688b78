"""The methods that a priced artifact runs: which budgets they accept, and how their settings are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tda_export.calibration.price_file import Priced
from tda_export.deployments import deployed, own_calibration, refuse_masks
from tda_export.errors import UsageError
from tda_export.evaluation.greedy_densities import GreedyDensities, read_densities
from tda_export.evaluation.priced_setting import PricedSetting, open_priced
from tda_export.evaluation.requests import Request
from tda_export.evaluation.row_methods import (
    Densities,
    ThresholdMethod,
    always_read,
    by_layer,
    threshold_prices,
    uniform_densities,
)
from tda_export.graph import contract
from tda_export.graph.derive import artifact_spec
from tda_export.packing import Parts
from tda_export.runtime.artifact import Artifact
from tda_export.runtime.deployment import PriceDeployment
from tda_export.runtime.session import Sessions


def check_priced(artifact: Artifact, request: Request) -> None:
    """Refuse requests that prices of rows cannot serve.

    Raises:
        UsageError: An option has no effect with prices, or the budget is beyond the artifact's table.
    """
    refuse_masks(artifact, request)
    if request.calibration is not None:
        raise UsageError(
            "--calibration: an artifact with prices contains its own table. Build it again with another calibration."
        )
    if request.densities is not None:
        raise UsageError("--densities is for --method teal only. Leave it out.")
    _price(artifact, request)


def open_priced_rows(artifact: Artifact, sessions: Sessions, request: Request) -> PricedSetting:
    """Prepare the artifact's own prices, for all that has them or for some parts."""
    given = {"price": request.price, "sparsity": request.sparsity, "max_kl": request.max_kl}
    budget = {name: value for name, value in given.items() if value is not None} or dict(artifact.manifest["budget"])
    deployment, parts = _price(artifact, request), _parts(artifact, request)
    if parts == "all":
        return open_priced("priced", artifact, sessions, deployment, budget)
    others = by_layer(_always_read(artifact, parts))
    return open_priced("priced", artifact, sessions, deployment, budget | {"parts": parts}, others)


def _price(artifact: Artifact, request: Request) -> PriceDeployment:
    """Return the requested price. A sparsity is a share of the bytes of the parts that may drop rows."""
    parts, table = _parts(artifact, request), artifact.price_table
    if parts == "all" or request.price is not None:
        deployment = deployed(artifact, request)
        assert isinstance(deployment, PriceDeployment)
        return deployment if parts == "all" else PriceDeployment(deployment.price)
    if request.max_kl is not None or request.sparsity is None:
        raise UsageError(
            f"--parts {parts}: KL was measured with all priced linears, so a budget by KL is not possible for some. "
            "Give --sparsity or --price."
        )
    if table is None:
        raise UsageError(
            f"{artifact.folder} contains no table of prices. Give --price, or build it with --calibration."
        )
    return PriceDeployment(table.of_parts(parts).price_for(sparsity=request.sparsity))


def _always_read(artifact: Artifact, parts: Parts) -> dict[str, torch.Tensor]:
    return always_read(artifact_spec(artifact), artifact.manifest["packing"], parts, head=artifact.prices_head)


def _parts(artifact: Artifact, request: Request) -> Parts:
    """Return the parts that may drop rows: without prices for the head, the layers' linears are all of them."""
    parts = request.parts or "all"
    return "all" if parts == "layers" and not artifact.prices_head else parts


def open_priced_dense(artifact: Artifact, sessions: Sessions, request: Request) -> PricedSetting:
    """Prepare decoding with every row."""
    return open_priced("dense", artifact, sessions, PriceDeployment(0.0), {})


def check_threshold(artifact: Artifact, request: Request) -> None:
    """Refuse requests that thresholds of inputs cannot serve.

    Raises:
        UsageError: The budget is not a sparsity, or calibration or densities do not fit.
        TdaError: One of them cannot be read.
    """
    others = (request.price, request.cett, request.max_kl, request.allocation, request.refresh)
    if request.sparsity is None or any(value is not None for value in others):
        raise UsageError(
            f"--method {request.method} takes --sparsity, --parts and --calibration"
            f"{', and --densities' if request.method == 'teal' else ''}. Give these alone, --sparsity among them."
        )
    if not 0 <= request.sparsity < 1:
        raise UsageError(f"sparsity {request.sparsity} is outside [0, 1). Give a fraction such as 0.3.")
    if request.densities is not None and request.method != "teal":
        raise UsageError("--densities is for --method teal only. Leave it out.")
    _magnitudes(artifact, request)
    _densities(artifact, request, request.sparsity)


def open_threshold(artifact: Artifact, sessions: Sessions, request: Request) -> PricedSetting:
    """Prepare TEAL or WINA."""
    assert request.sparsity is not None
    method: ThresholdMethod = "wina" if request.method == "wina" else "teal"
    spec, packing, parts = artifact_spec(artifact), artifact.manifest["packing"], _threshold_parts(request)
    densities = _densities(artifact, request, request.sparsity)
    prices = threshold_prices(method, _magnitudes(artifact, request), spec, packing, densities)
    budget: dict[str, Any] = {"sparsity": request.sparsity} | ({} if parts == "all" else {"parts": parts})
    if method == "teal":
        budget["densities"] = "uniform" if request.densities is None else "greedy"
    row_prices = by_layer(_always_read(artifact, "layers" if parts == "all" else parts) | prices)
    return open_priced(method, artifact, sessions, PriceDeployment(1.0), budget, row_prices)


def _threshold_parts(request: Request) -> Parts:
    """Return the parts that drop rows by thresholds: the papers' methods read the head whole."""
    parts = request.parts or "all"
    return "all" if parts == "layers" else parts


def _densities(artifact: Artifact, request: Request, sparsity: float) -> Densities:
    spec, packing, parts = artifact_spec(artifact), artifact.manifest["packing"], _threshold_parts(request)
    if request.densities is None:
        return uniform_densities(spec, packing, parts, sparsity)
    found: GreedyDensities = read_densities(request.densities)
    found.require(request.densities, artifact.manifest["model"]["fingerprint"], packing, parts)
    return found.at(sparsity)


def _magnitudes(artifact: Artifact, request: Request) -> Priced:
    own = contract.CALIBRATION_FILE in artifact.manifest["files"]
    if request.calibration is None and not own:
        raise UsageError(
            f"{artifact.folder} contains no calibration, from which --method {request.method} takes its thresholds. "
            "Give a file of 'tda-export calibrate' with --calibration."
        )
    calibration = own_calibration(artifact, request.calibration)
    if calibration.priced is None:
        where: Path = request.calibration or artifact.file(contract.CALIBRATION_FILE)
        raise UsageError(
            f"{where} contains no sizes of inputs. Make one with 'tda-export calibrate --method priced' and give it "
            "with --calibration."
        )
    return calibration.priced
