"""Turn a budget into a deployment: the one place where a command's budget becomes what decode is given.

Prices are chosen without PyTorch; thresholds of prompt masks are chosen from the calibration's curves, which need it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tda_export.errors import UsageError
from tda_export.graph import contract
from tda_export.runtime.artifact import Artifact
from tda_export.runtime.deployment import AnyDeployment, Deployment, Refresh, one_level
from tda_export.runtime.price_budget import chosen_price

if TYPE_CHECKING:
    from tda_export.calibration.budgets import Allocation, AllocationRule, Budget
    from tda_export.calibration.file import Calibration


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a user asked for; a field is None where the user gave nothing.

    `price` is the price of a byte; `sparsity` and `cett` are shares in [0, 1); `max_kl` is in nats per token. `refresh`
    replaces the artifact's own refresh. `calibration` is a calibration file that replaces the artifact's own.
    `prompt_tokens` is the prompt length for which the KL of a price is predicted; None takes calibration's prompt
    length.
    """

    price: float | None = None
    sparsity: float | None = None
    max_kl: float | None = None
    cett: float | None = None
    allocation: AllocationRule | None = None
    refresh: Refresh | None = None
    calibration: Path | None = None
    prompt_tokens: int | None = None

    @property
    def has_budget(self) -> bool:
        """Whether a budget was given."""
        return any(value is not None for value in (self.price, self.sparsity, self.max_kl, self.cett, self.allocation))

    def budget(self) -> Budget:
        """Return the budget that chooses prompt masks.

        Raises:
            UsageError: No budget is given, more than one is given, or one is out of range.
        """
        from tda_export.calibration.budgets import make_budget

        return make_budget(self.cett, self.sparsity, self.allocation, self.max_kl)


def deployed(artifact: Artifact, asked: Asked) -> AnyDeployment:
    """Return the deployment for a request; the artifact's own deployment where nothing was asked for.

    Raises:
        UsageError: This artifact or its calibration cannot meet the request.
        TdaError: A calibration cannot be read.
    """
    if artifact.layout == "priced":
        refuse_masks(artifact, asked)
        if not asked.has_budget:
            return artifact.deployment
        budget = {"price": asked.price, "sparsity": asked.sparsity, "max_kl": asked.max_kl}
        return chosen_price(artifact, **budget, prompt_tokens=asked.prompt_tokens)
    if asked.price is not None:
        raise UsageError(
            f"--price: {artifact.folder} has masks and no prices. Build one with "
            "'tda-export build MODEL --method priced'."
        )
    if asked.has_budget:
        return mask_deployment(artifact, asked.budget(), asked.calibration, asked.refresh)
    own = artifact.deployment
    assert isinstance(own, Deployment)
    return own if asked.refresh is None else own.with_refresh(asked.refresh)


def refuse_masks(artifact: Artifact, asked: Asked) -> None:
    """Refuse options of prompt masks for a priced artifact, where they have no effect."""
    for option, value in (("--cett", asked.cett), ("--allocation", asked.allocation), ("--refresh", asked.refresh)):
        if value is not None:
            raise UsageError(
                f"{option} needs an artifact with masks, and {artifact.folder} has prices. Leave it out, or "
                "build an artifact with 'tda-export build MODEL --method tda'."
            )


def mask_deployment(
    artifact: Artifact, budget: Budget, calibration: Path | None = None, refresh: Refresh | None = None
) -> Deployment:
    """Choose how decode drops neurons for a budget, from the artifact's own calibration or another one of the same
    model.

    A sparsity counts all tokens, refreshes included. Without `refresh` the artifact's own refresh is used.

    Raises:
        UsageError: There is no calibration, it is of another model, or the artifact was not built for what the budget
            needs.
        TdaError: It cannot be read.
    """
    from tda_export.calibration.budgets import Budget

    own = artifact.deployment
    assert isinstance(own, Deployment)
    refresh = refresh or own.refresh
    allocation = own_calibration(artifact, calibration).allocate(budget, refresh.tokens)
    if not allocation.token_thresholds:
        # A tail mean that the user asked for stays; one that came with an allocation by KL is dropped with it.
        tail_mean = not Budget(**artifact.manifest["budget"]).by_kl
        deployment = one_level(allocation.thresholds, artifact.shape.num_layers, artifact.ffn_matrices)
        return replace(deployment, tail_mean=tail_mean, refresh=refresh)
    method = artifact.manifest["method"]
    suits = method["tail"] == "mean" and method["two_levels"]
    if allocation.prior_tokens != artifact.manifest["prior_tokens"] or not suits:
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


def own_calibration(artifact: Artifact, other: Path | None) -> Calibration:
    """Read the calibration that an artifact carries, or another of the same model.

    Raises:
        UsageError: There is no calibration, or the other one is of another model.
        TdaError: It cannot be read.
    """
    from tda_export.calibration.file import read_calibration

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
            f"{artifact.folder} contains no calibration, so its budget is fixed. Leave the budget out; eval also takes "
            "another file with --calibration."
        )
    return read_calibration(artifact.file(contract.CALIBRATION_FILE))
