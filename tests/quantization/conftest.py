"""Fixtures of the tests of quantisation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tda_export.models.source import ModelSource, resolve_model


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> ModelSource:
    return resolve_model(str(tiny_model))
