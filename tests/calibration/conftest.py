"""Fixtures of the tests of datasets and of calibration by KL."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.calibration.kl_case import KlCase, make_case


@pytest.fixture(autouse=True, scope="package")
def _no_sleep() -> Iterator[None]:
    """Skip the five seconds that `datasets` sleeps whenever a Parquet stream ends or is collected."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
        yield
        gc.collect()


@pytest.fixture(scope="session")
def kl_case(tmp_path_factory: pytest.TempPathFactory) -> KlCase:
    """A small random Llama with grouped heads that has read four sequences. Copy the model before changing it."""
    return make_case(tmp_path_factory.mktemp("kl"))
