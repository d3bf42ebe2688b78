"""How decode drops neurons: all decisions of a driver except the prompt itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tda_export.errors import UsageError
from tda_export.ffn_share import two_level_share
from tda_export.pricing import PriceTable


@dataclass(frozen=True)
class Refresh:
    """After every `tokens` generated tokens, prefill reads them again; 0 means never.

    A refresh replaces their keys and values by dense ones and chooses a new prompt mask. The statistics from before are
    multiplied by `decay`.
    """

    tokens: int = 0
    decay: float = 1.0

    def __post_init__(self) -> None:
        if self.tokens == 1 or self.tokens < 0:
            raise UsageError(f"A refresh after every {self.tokens} tokens: give 2 or more, or 0 for none.")
        if not 0 <= self.decay <= 1:
            raise UsageError(f"A decay of {self.decay} is outside [0, 1].")

    def ffn_share(self, sparse: float) -> float:
        """Return the mean share of FFN bytes that a token reads, where sparse steps read the share `sparse` and
        refreshes read all."""
        return sparse if not self.tokens else sparse + (1.0 - sparse) / self.tokens

    def sparsity(self, sparse: float) -> float:
        """Return the mean share of FFN bytes that a token does not read, where sparse steps leave the share `sparse`
        unread."""
        return 1.0 - self.ffn_share(1.0 - sparse)


NO_REFRESH = Refresh()


@dataclass(frozen=True)
class Deployment:
    """Thresholds, and the settings that they were calibrated with.

    `thresholds`: of neuron scores, float32 [L]; None where prefill selects by rank. `token_thresholds`: of gate
    estimates, float32 [L]; 0 is off. `prior`: whether the statistics of a prompt begin with the artifact's prior
    instead of zero. `tail_mean`: whether dropped neurons are replaced by their mean over the prompt, if the artifact
    computes it. `survivors`: float32 [L] or [1], the share of the prompt mask's neurons that a token is expected not to
    skip, from which the bytes read follow. `ffn_matrices`: number of matrices of the FFN.
    """

    thresholds: np.ndarray | None
    token_thresholds: np.ndarray
    prior: bool = True
    tail_mean: bool = True
    refresh: Refresh = NO_REFRESH
    survivors: np.ndarray = field(default_factory=lambda: np.ones(1, np.float32))
    ffn_matrices: int = field(kw_only=True)

    @property
    def read_as(self) -> object:
        """The key of prompts that can continue from each other's statistics."""
        return self.prior

    @property
    def by_calibration(self) -> str:
        """Which part of a generation's reported bytes is expected by calibration instead of counted; empty for none."""
        return " (masks counted, rows skipped by tokens as calibrated)" if self.token_thresholds.any() else ""

    def with_refresh(self, refresh: Refresh) -> Deployment:
        """Return the same deployment with another refresh."""
        return replace(self, refresh=refresh)

    def ffn_share(self, mask_density: np.ndarray) -> float:
        """Return the share of FFN bytes that a sparse step reads under prompt masks of the given densities, [L]."""
        return float(two_level_share(mask_density, mask_density * self.survivors, self.ffn_matrices).mean())


@dataclass(frozen=True)
class PriceDeployment:
    """The price of a byte of weights, and the share of the linears' bytes that a token is expected to read at it."""

    price: float
    share: float = 1.0

    @property
    def read_as(self) -> object:
        """The key of prompts that can continue from each other: the same for all, since prefill does not depend on the
        price."""
        return None

    @property
    def by_calibration(self) -> str:
        """Which part of a generation's reported bytes is expected by calibration instead of counted; empty for none."""
        return " (as calibrated)" if self.price > 0 else ""

    @property
    def refresh(self) -> Refresh:
        """No refresh: nothing is chosen from the tokens that were read."""
        return NO_REFRESH


AnyDeployment = Deployment | PriceDeployment


def price_deployment(price: float, table: PriceTable | None) -> PriceDeployment:
    """Return a price with the share that calibration expects to be read; none without a table, or beyond it."""
    if not math.isfinite(price):
        raise UsageError(f"A price of {price}: give a finite number, 0 for dense.")
    if price < 0:
        raise UsageError(f"A price of {price:g} is negative. Give 0 for dense, or more.")
    if table is None or price > table.most_price:
        return PriceDeployment(price)
    return PriceDeployment(price, table.predicted(price).share)


def one_level(thresholds: Any, layers: int, ffn_matrices: int) -> Deployment:
    """Return a deployment of prompt masks alone: no prior, no tail mean, no token thresholds."""
    chosen = None if thresholds is None else np.asarray(thresholds, np.float32)
    return Deployment(chosen, np.zeros(layers, np.float32), prior=False, tail_mean=False, ffn_matrices=ffn_matrices)
