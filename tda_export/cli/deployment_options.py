"""Options of commands that run an artifact, for how to decode: --mask, budgets, --refresh and --provider."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tda_export.cli.options import (
    budget_options,
    check_mask,
    chosen_refresh,
    mask_option,
    price_option,
    provider_option,
    refresh_option,
)

if TYPE_CHECKING:
    from tda_export.calibration.budgets import AllocationRule
    from tda_export.runtime.deployment import AnyDeployment
    from tda_export.runtime.generate import MaskMode
    from tda_export.runtime.model import Model


@dataclass(frozen=True)
class Deployed:
    """The values of `deployment_options`: how to decode, and where to run."""

    mask: MaskMode | None
    price: float | None
    cett: float | None
    sparsity: float | None
    allocation: AllocationRule | None
    max_kl: float | None
    refresh: int | None
    provider: str

    def load(
        self, artifact: Path, *, keep_answers: bool = False, prompt_tokens: int | None = None
    ) -> tuple[Model, AnyDeployment]:
        """Load an artifact, and choose a deployment for the budget, if one is given, from its calibration's tables.

        `prompt_tokens`: the length of the prompt after which a KL is predicted; None means calibration's length.
        """
        from tda_export.deployments import Asked, deployed
        from tda_export.errors import UsageError
        from tda_export.runtime import Model, open_artifact
        from tda_export.runtime.model import check_keeping
        from tda_export.runtime.providers import choose_provider

        asked = Asked(
            price=self.price,
            sparsity=self.sparsity,
            max_kl=self.max_kl,
            cett=self.cett,
            allocation=self.allocation,
            prompt_tokens=prompt_tokens,
        )
        if self.mask == "dense" and (asked.has_budget or self.refresh is not None):
            raise UsageError("--mask dense reads every row, so a budget has no effect. Leave one of them out.")
        opened = open_artifact(artifact)
        provider = choose_provider(self.provider, opened.shape.dtype)
        asked = replace(asked, refresh=chosen_refresh(opened, self.refresh))
        check_mask(opened, self.mask)
        if keep_answers:
            check_keeping(opened)
        deployment = deployed(opened, asked)  # a budget that cannot be met is refused before any session is opened
        return Model(opened, provider), deployment


def deployment_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add --mask, --price, budgets, --refresh and --provider; the command gets them as `deployed`."""

    @functools.wraps(command)
    def grouped(
        *,
        mask: MaskMode | None,
        price: float | None,
        cett: float | None,
        sparsity: float | None,
        allocation: AllocationRule | None,
        max_kl: float | None,
        refresh: int | None,
        provider: str,
        **others: Any,
    ) -> None:
        command(deployed=Deployed(mask, price, cett, sparsity, allocation, max_kl, refresh, provider), **others)

    return mask_option(price_option(budget_options(refresh_option(provider_option(grouped)))))
