"""KL of a quantised model to its float model: the loss from quantisation, and what prices add to it.

The KL of a price is measured against the same integer model, read densely, and `--max-kl` limits that KL. `quantize`
measures the loss from quantisation, on its own text. The two add up approximately.
"""

from __future__ import annotations

import math
from typing import Any

COLUMN = "KL to float"


def integers_kl(quantization: Any) -> float | None:
    """Return the KL from quantisation, in nats per token; None where it was not measured, or for floats.

    Args:
        quantization: What `quantize` recorded about a model, as stored in config.json, a manifest or a calibration.
    """
    loss = quantization.get("loss") if isinstance(quantization, dict) else None
    kl = loss.get("kl") if isinstance(loss, dict) else None
    try:
        return float(kl) if isinstance(kl, int | float) and math.isfinite(kl) else None
    except OverflowError:
        return None


def float_kl_cells(integers: float | None, kl: float) -> list[str]:
    """Return a table row's cells under `COLUMN`: none for floats."""
    return [] if integers is None else [f"{integers + kl:.4f}"]


def float_kl_columns(integers: float | None) -> list[str]:
    """Return the columns that `float_kl_cells` fills."""
    return [] if integers is None else [COLUMN]


def float_kl_text(integers: float, kl: float) -> str:
    """Say what a model at a price loses to the float model."""
    return (
        f"KL to the float model about {integers + kl:.4f} nats a token: {integers:.4f} by the integers and {kl:.4f} by "
        "the rows that are left out"
    )
