"""Turn a budget into a price with a priced artifact's table, without PyTorch."""

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
        artifact: The artifact on disk.
        price: The price of a byte, as in the table; 0 is dense.
        sparsity: Share of the bytes of the layers' linears not to read, in [0, 1).
        max_kl: The largest predicted KL to dense, in nats per token.
        prompt_tokens: The prompt length for which a KL is predicted; None takes calibration's.

    Raises:
        UsageError: No or several budgets are given, one is out of range or beyond the table, or no prices were
            measured.
    """
    if sum(value is not None for value in (price, sparsity, max_kl)) != 1:
        raise UsageError("Give exactly one budget: --price, --sparsity or --max-kl.")
    table = artifact.price_table
    if price is not None:
        chosen = price_deployment(price, table)
        if table is not None:
            table.predicted(price)  # refuses a price beyond the table, whose bytes are not known
        return chosen
    if table is None:
        raise UsageError(
            f"{artifact.folder} contains no table of prices. Give --price, or build it with --calibration."
        )
    here = table if prompt_tokens is None else table.after(prompt_tokens)
    return price_deployment(here.price_for(sparsity=sparsity, max_kl=max_kl), table)
