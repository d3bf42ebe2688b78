"""Calibrates prices in less time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tda_export.calibration import price_run, price_table

SHARES = (0.9, 0.6, 0.3)  # fewer than the product measures


@pytest.fixture(scope="module", autouse=True)
def few_prices(priced_calibration: Path) -> Iterator[None]:
    """Measure only `SHARES` in a module that imports this fixture.

    Other modules share `priced_calibration`, so it is made before.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module in (price_run, price_table):
            patch.setattr(module, "SHARES", SHARES)
        yield
