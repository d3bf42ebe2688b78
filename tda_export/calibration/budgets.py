"""Choose the thresholds of each layer from a calibration and a budget."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch

from tda_export.calibration.curves import CurveSums
from tda_export.calibration.kl_table import MARGIN, SHARES, KlSetting, KlTable, setting_at, sparsest_within
from tda_export.calibration.price_table import SHARES as PRICE_SHARES
from tda_export.errors import UsageError
from tda_export.ffn_share import GATED, truncation_share, two_level_share
from tda_export.pricing import PriceTable

PRICE_MARGIN = 0.1  # how far the last measured share of prices may miss its target
AllocationRule = Literal["kl", "uniform"]


@dataclass(frozen=True)
class Budget:
    """What may be lost or must be saved: exactly one of three budgets.

    `cett`: the mean CETT that each layer may lose (the paper's). `sparsity`: the share of FFN bytes to save.
    `allocation`: how it is spread over layers: `kl` by the calibration's KL path (prompt mask and token thresholds),
    `uniform` the same share of neurons in every layer (prompt mask only). `max_kl`: a limit in nats per token, for the
    sparsest point of the KL path whose predicted KL to dense is within it.
    """

    cett: float | None = None
    sparsity: float | None = None
    allocation: AllocationRule = "kl"
    max_kl: float | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.cett, self.sparsity, self.max_kl)) != 1:
            raise UsageError("Give exactly one budget: --cett, --sparsity or --max-kl.")
        if self.allocation not in get_args(AllocationRule):
            known = ", ".join(get_args(AllocationRule))
            raise UsageError(f"Allocation {self.allocation!r} is not known. Use {known}, or update tda-export.")
        for name, value in (("CETT", self.cett), ("sparsity", self.sparsity)):
            if value is not None and not 0 <= value < 1:
                raise UsageError(f"{name} {value} is outside [0, 1). Give a fraction such as 0.2.")
        if self.max_kl is not None and not 0 < self.max_kl < float("inf"):
            raise UsageError(f"--max-kl {self.max_kl}: give a positive number of nats a token, such as 0.1.")

    @property
    def by_kl(self) -> bool:
        """Whether the budget is met by the KL path, with both levels and the prior."""
        return self.max_kl is not None or (self.sparsity is not None and self.allocation == "kl")

    def of_sparse_steps(self, refresh_tokens: int) -> Budget:
        """Return the budget of the steps between refreshes, one of which comes every `refresh_tokens` tokens.

        0 is none; otherwise it is at least 2.

        A sparsity p (a share of bytes) becomes p N / (N - 1) with one refresh every N tokens; other budgets do not
        change.

        Raises:
            UsageError: The refreshes alone read more than the sparsity allows.
        """
        if self.sparsity is None or not refresh_tokens:
            return self
        sparsity = self.sparsity * refresh_tokens / (refresh_tokens - 1)
        if sparsity >= 1:
            raise UsageError(
                f"Sparsity {self.sparsity} with a refresh every {refresh_tokens} tokens: the refreshes alone read "
                f"{1 / refresh_tokens:.3f} of the bytes. Give a lower --sparsity, or more tokens between refreshes."
            )
        return replace(self, sparsity=sparsity)

    def describe(self) -> dict[str, Any]:
        """The budget as plain data, for manifests and provenance."""
        if self.cett is not None:
            return {"cett": self.cett}
        if self.max_kl is not None:
            return {"max_kl": self.max_kl}
        return {"sparsity": self.sparsity, "allocation": self.allocation}

    def __str__(self) -> str:
        if self.cett is not None:
            return f"CETT {self.cett}"
        return f"KL {self.max_kl}" if self.max_kl is not None else f"sparsity {self.sparsity}, {self.allocation}"


def make_budget(
    cett: float | None, sparsity: float | None, allocation: AllocationRule | None, max_kl: float | None = None
) -> Budget:
    """Return the budget of options; None means that an option is not given.

    Raises:
        UsageError: No or several budgets are given, one is out of range, or an allocation is given without a sparsity.
    """
    if allocation is not None and sparsity is None:
        raise UsageError("--allocation spreads a --sparsity over the layers. Give --sparsity, or leave it out.")
    return Budget(cett, sparsity, allocation or "kl", max_kl)


def check_reach(budget: Budget) -> None:
    """Refuse, before any long work, a sparsity beyond those that the KL path will be measured at.

    Raises:
        UsageError: The sparsity is beyond the last measured setting.
    """
    if budget.by_kl and budget.sparsity is not None and 1 - budget.sparsity < SHARES[-1] - MARGIN:
        raise UsageError(
            f"Sparsity {budget.sparsity} is more than the KL path is measured at (about {1 - SHARES[-1]:.1f}). "
            "Give a lower --sparsity, or --allocation uniform."
        )


def check_priced(budget: Budget) -> None:
    """Refuse, before any long work, a budget that prices of rows cannot meet.

    Raises:
        UsageError: The budget is for prompt masks, or a sparsity beyond those that prices are measured at.
    """
    if not budget.by_kl:
        raise UsageError(
            "--cett and --allocation uniform are budgets of masks. Give --sparsity or --max-kl, or --method tda."
        )
    if budget.sparsity is not None and 1 - budget.sparsity < PRICE_SHARES[-1] - PRICE_MARGIN:
        raise UsageError(
            f"Sparsity {budget.sparsity} is more than prices are measured at (about {1 - PRICE_SHARES[-1]:.1f}). "
            "Give a lower --sparsity."
        )


def nearest_priced(budget: Budget, tables: Iterable[PriceTable]) -> Budget:
    """Return the budget or, where it is beyond the measured tables of prices, the largest that all of them measured."""
    for table in tables:
        if budget.sparsity is not None and 1 - budget.sparsity < table.least_share:
            budget = replace(budget, sparsity=table.most_sparsity)
        if budget.max_kl is not None and budget.max_kl > table.most_kl:
            budget = replace(budget, max_kl=table.most_kl)
    return budget


def nearest_reachable(budget: Budget, table: KlTable | None) -> Budget:
    """Return the budget or, where its sparsity is beyond the table, the largest sparsity that the table measured."""
    if table is None or not budget.by_kl or budget.sparsity is None or 1 - budget.sparsity >= float(table.share[-1]):
        return budget
    return replace(budget, sparsity=table.most_sparsity)


@dataclass(frozen=True)
class Allocation:
    """The chosen thresholds of each layer, with the calibration's expectations (lists of L floats).

    `density` is the share of neurons in the prompt mask. With the second level, `token_thresholds` apply to gate
    estimates and `token_density` is the share of neurons that a token does not skip; both are empty without it. `kl` is
    the predicted KL to dense in nats per token, where the calibration measured it. `prior_tokens` is the pseudo-count
    of the prior that the thresholds are meant for. `tail_mean` says whether dropped neurons are replaced by their mean.
    """

    thresholds: list[float]
    density: list[float]
    cett: list[float]
    recrossing: list[int]  # layers whose curve exceeds the CETT budget below the chosen threshold
    token_thresholds: list[float] = field(default_factory=list)
    token_density: list[float] = field(default_factory=list)
    kl: float | None = None
    prior_tokens: float = 0.0
    tail_mean: bool = False
    ffn_matrices: int = field(kw_only=True)

    @property
    def sparsity(self) -> float:
        """The expected share of FFN bytes that decode does not read."""
        mask = sum(self.density) / len(self.density)
        token = sum(self.token_density) / len(self.token_density) if self.token_density else mask
        return 1.0 - two_level_share(mask, token, self.ffn_matrices)


@dataclass(frozen=True)
class TruncationAllocation(Allocation):
    """The allocation of threshold truncation: `density` is the share of down rows that are read. All gate and up rows
    are read."""

    @property
    def sparsity(self) -> float:
        """The expected share of FFN bytes that decode does not read."""
        return 1.0 - truncation_share(sum(self.density) / len(self.density), self.ffn_matrices)


def allocate(
    budget: Budget,
    curves: CurveSums,
    grid: torch.Tensor,
    table: KlTable | None = None,
    *,
    ffn_matrices: int,
) -> Allocation:
    """Choose the thresholds.

    A CETT budget takes, in each layer, the largest grid threshold whose mean CETT is within the budget (the paper's
    rule; the curve is not strictly monotone, since dropped vectors may cancel). A uniform sparsity takes, in each
    layer, the threshold whose density is nearest to 1 - sparsity. Other budgets take a point of the KL path.

    Args:
        budget: The budget.
        curves: The curves from calibration.
        grid: The thresholds, float32 [K].
        table: The measured KL path, if the calibration has one.
        ffn_matrices: The number of matrices of the FFN.

    Raises:
        UsageError: The budget needs a KL path, and there is none or it is not sparse enough.
    """
    if not budget.by_kl:
        return _choose(budget.cett, budget.sparsity, curves.mean_cett, curves.mean_density, grid, ffn_matrices)
    if table is None:
        raise UsageError(
            "This calibration contains only CETT curves. Calibrate without --curves-only, or give --cett, or "
            "--sparsity with --allocation uniform."
        )
    if budget.max_kl is not None:
        return _of_path(sparsest_within(table, budget.max_kl), table, ffn_matrices)
    assert budget.sparsity is not None
    return _of_path(setting_at(table, 1.0 - budget.sparsity), table, ffn_matrices)


def _of_path(setting: KlSetting, table: KlTable, ffn_matrices: int) -> Allocation:
    return Allocation(
        thresholds=setting.thresholds,
        density=setting.mask_density,
        cett=setting.cett,
        recrossing=[],
        token_thresholds=setting.token_thresholds,
        token_density=setting.token_density,
        kl=setting.kl,
        prior_tokens=float(table.prior_tokens),
        tail_mean=True,
        ffn_matrices=ffn_matrices,
    )


def allocate_truncation(
    budget: Budget, curves: CurveSums, grid: torch.Tensor, *, ffn_matrices: int
) -> TruncationAllocation:
    """Choose thresholds of r_i(t) for threshold truncation, from the curves of the token estimator.

    Truncation reads every gate row and up row, and the share d of down rows: (2 + d) / 3 of the FFN's bytes, or (1 + d)
    / 2 without gates. So a sparsity p needs d = 1 - 3 p, or 1 - 2 p without gates.

    Args:
        budget: As `allocate` takes it.
        curves: The curves of a calibration with the token estimator.
        grid: The thresholds, float32 [K].
        ffn_matrices: n, the number of matrices of the FFN.

    Raises:
        UsageError: The curves come from the prompt estimator, or the sparsity is more than 1/n.
    """
    if curves.token_density.shape[1] == 0:
        raise UsageError(
            "Threshold truncation drops neurons token by token, and this calibration is of prompts. Calibrate with "
            "'tda-export calibrate --method tda --estimator token'."
        )
    if budget.sparsity is not None and budget.sparsity > 1 / ffn_matrices:
        rows = "gate and up row" if ffn_matrices == GATED else "up row"
        raise UsageError(
            f"Threshold truncation reads every {rows}, so it saves at most 1/{ffn_matrices} of the FFN's bytes, and "
            f"sparsity {budget.sparsity} is more. Give --sparsity up to {math.floor(1000 / ffn_matrices) / 1000}, or "
            "another method."
        )
    dropped = None if budget.sparsity is None else min(ffn_matrices * budget.sparsity, 1.0)
    density = curves.token_density / curves.tokens  # [L, K]
    chosen = _choose(budget.cett, dropped, curves.mean_cett, density, grid, ffn_matrices)
    return TruncationAllocation(
        chosen.thresholds, chosen.density, chosen.cett, chosen.recrossing, ffn_matrices=ffn_matrices
    )


def _choose(
    budget_cett: float | None,
    dropped: float | None,
    cett: torch.Tensor,
    density: torch.Tensor,
    grid: torch.Tensor,
    ffn_matrices: int,
) -> Allocation:
    """Choose from curves [L, K] by a CETT or by a uniform share of neurons to drop; one of the two is None."""
    if budget_cett is not None:
        within = cett <= budget_cett  # [L, K]; column 0 (nothing dropped) always is
        chosen = len(grid) - 1 - within.flip(1).int().argmax(dim=1)  # [L], the last threshold within the budget
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
        ffn_matrices=ffn_matrices,
    )
