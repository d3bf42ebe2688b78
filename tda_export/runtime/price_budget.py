"""From a budget to a price: what a priced artifact's table says, without PyTorch."""

from __future__ import annotations

from tda_export.errors import UsageError
from tda_export.runtime.artifact import Artifact
from tda_export.runtime.deployment import PriceDeployment, price_deployment


def chosen_price(
    artifact: Artifact,
    *,
    price: float | None = None,
    sparsity: float | None = None,
    max_kl: float | None = None,
    prompt_tokens: int | None = None,
) -> PriceDeployment:
    """Return the deployment for one of three budgets of a priced artifact.

    Args:
        artifact: On disk.
        price: Of a byte, as in the table; 0 is dense.
        sparsity: Share of the linears' bytes not to read, in [0, 1).
        max_kl: The most predicted KL to dense, nats a token.
        prompt_tokens: Of the prompt that a KL is predicted after; None takes those of calibration.

    Raises:
        UsageError: None or several are given, one is out of range or beyond the table, or nothing was measured.
    """
    if sum(value is not None for value in (price, sparsity, max_kl)) != 1:
        raise UsageError("Give exactly one budget: --price, --sparsity or --max-kl.")
    table = artifact.price_table
    if price is not None:
        chosen = price_deployment(price, table)
        if table is not None:
            table.predicted(price)  # refuses what lies beyond it: its bytes are not known
        return chosen
    if table is None:
        raise UsageError(
            f"{artifact.folder} contains no table of prices. Give --price, or build it with --calibration."
        )
    here = table if prompt_tokens is None else table.after(prompt_tokens)
    return price_deployment(here.price_for(sparsity=sparsity, max_kl=max_kl), table)
