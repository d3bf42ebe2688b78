"""What tests of datasets share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="package")
def _no_sleep() -> Iterator[None]:
    """Spare the five seconds that `datasets` sleeps whenever a Parquet stream ends or is collected."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
        yield
        gc.collect()
