"""From curves and a budget to one threshold a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from tda_export.calibration.curves import CurveSums
from tda_export.errors import UsageError

AllocationRule = Literal["uniform"]
TRUNCATION_LARGEST_SPARSITY = 1 / 3  # all that reading no down row saves


@dataclass(frozen=True)
class Budget:
    """What each layer may lose (`cett`), or the share of FFN bytes to save (`sparsity`) and its rule for layers."""

    cett: float | None = None
    sparsity: float | None = None
    allocation: AllocationRule = "uniform"

    def __post_init__(self) -> None:
        if (self.cett is None) == (self.sparsity is None):
            raise UsageError("A budget is either --cett or --sparsity. Give one of them.")
        if self.allocation not in get_args(AllocationRule):
            known = ", ".join(get_args(AllocationRule))
            raise UsageError(f"Allocation {self.allocation!r} is not known here. Use {known}, or update tda-export.")
        for name, value in (("CETT", self.cett), ("sparsity", self.sparsity)):
            if value is not None and not 0 <= value < 1:
                raise UsageError(f"{name} {value} is outside [0, 1). Give a fraction such as 0.2.")

    def describe(self) -> dict[str, Any]:
        """The budget as plain data, for manifests and provenance."""
        if self.cett is not None:
            return {"cett": self.cett}
        return {"sparsity": self.sparsity, "allocation": self.allocation}

    def __str__(self) -> str:
        return f"CETT {self.cett}" if self.cett is not None else f"sparsity {self.sparsity}, {self.allocation}"


def make_budget(cett: float | None, sparsity: float | None, allocation: AllocationRule | None) -> Budget:
    """Return a budget of options, of which None is not given.

    Raises:
        UsageError: Both or none of CETT and sparsity are given, one is out of range, or the rule has nothing to spread.
    """
    if allocation is not None and sparsity is None:
        raise UsageError("--allocation spreads a --sparsity over the layers. Give --sparsity, or leave it out.")
    return Budget(cett, sparsity, allocation or "uniform")


@dataclass(frozen=True)
class Allocation:
    """The chosen threshold of each layer, with what the curves expect of it (lists of L floats)."""

    thresholds: list[float]
    density: list[float]
    cett: list[float]
    recrossing: list[int]  # layers whose curve exceeds the CETT budget below the chosen threshold

    @property
    def sparsity(self) -> float:
        """Expected share of FFN bytes that decode does not read."""
        return 1.0 - sum(self.density) / len(self.density)


@dataclass(frozen=True)
class TruncationAllocation(Allocation):
    """Of threshold truncation: `density` is the share of down rows that are read, of gate and up all are."""

    @property
    def sparsity(self) -> float:
        """Expected share of FFN bytes that decode does not read."""
        return super().sparsity / 3


def allocate(budget: Budget, curves: CurveSums, grid: torch.Tensor) -> Allocation:
    """Choose the thresholds.

    A CETT budget takes in each layer the largest grid threshold whose mean CETT is within it (the paper's rule; the
    curve is not strictly monotone, since dropped vectors may cancel). A uniform sparsity takes in each layer the
    threshold whose density is nearest to 1 - sparsity.

    Args:
        budget: What may be lost, or must be saved.
        curves: From calibration.
        grid: The thresholds, float32 [K].
    """
    return _choose(budget.cett, budget.sparsity, curves.mean_cett, curves.mean_density, grid)


def allocate_truncation(budget: Budget, curves: CurveSums, grid: torch.Tensor) -> TruncationAllocation:
    """Choose thresholds of r_i(t) for threshold truncation, from the curves of the token estimator.

    Truncation reads every gate row and up row, and the share d of down rows: (2 + d) / 3 of the FFN's bytes. So a
    sparsity p asks for d = 1 - 3 p.

    Args:
        budget: As `allocate` takes it.
        curves: Of a calibration with the token estimator.
        grid: The thresholds, float32 [K].

    Raises:
        UsageError: The curves are the prompt estimator's, or the sparsity is more than 1/3.
    """
    if curves.token_density.shape[1] == 0:
        raise UsageError(
            "Threshold truncation drops neurons token by token, and this calibration is of prompts. Calibrate with "
            "'tda-export calibrate --estimator token'."
        )
    if budget.sparsity is not None and budget.sparsity > TRUNCATION_LARGEST_SPARSITY:
        raise UsageError(
            f"Threshold truncation reads every gate and up row, so it saves at most 1/3 of the FFN's bytes, and "
            f"sparsity {budget.sparsity} is more. Give --sparsity up to 0.333, or another method."
        )
    dropped = None if budget.sparsity is None else min(3.0 * budget.sparsity, 1.0)
    density = curves.token_density / curves.tokens  # [L, K]
    chosen = _choose(budget.cett, dropped, curves.mean_cett, density, grid)
    return TruncationAllocation(chosen.thresholds, chosen.density, chosen.cett, chosen.recrossing)


def _choose(
    budget_cett: float | None, dropped: float | None, cett: torch.Tensor, density: torch.Tensor, grid: torch.Tensor
) -> Allocation:
    """Choose from curves [L, K] by a CETT or, uniformly, by the share of neurons to drop; one of them is None."""
    if budget_cett is not None:
        within = cett <= budget_cett  # [L, K]; column 0 (nothing dropped) always is
        chosen = len(grid) - 1 - within.flip(1).int().argmax(dim=1)  # [L], the last within
        recrossing = [i for i, k in enumerate(chosen.tolist()) if not bool(within[i, : k + 1].all())]
    else:
        assert dropped is not None
        chosen = (density - (1.0 - dropped)).abs().argmin(dim=1)
        recrossing = []
    rows = torch.arange(len(chosen))
    return Allocation(
        thresholds=grid[chosen].tolist(),
        density=density[rows, chosen].tolist(),
        cett=cett[rows, chosen].tolist(),
        recrossing=recrossing,
    )
