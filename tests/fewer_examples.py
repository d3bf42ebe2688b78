"""A plugin of pytest for slow machines, like emulators. With `-p tests.fewer_examples --examples 20`, a property test
draws at most that many examples, each without a deadline."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

SETTINGS = "_hypothesis_internal_use_settings"  # where Hypothesis's own plugin finds a test's settings


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--examples", type=int, required=True, help="the most examples of a property test")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tests = {item.function for item in items if isinstance(item, pytest.Function)}
    for test in tests:
        if (own := getattr(test, SETTINGS, None)) is not None:
            most, checks = min(own.max_examples, config.getoption("--examples")), list(HealthCheck)
            setattr(test, SETTINGS, settings(own, max_examples=most, deadline=None, suppress_health_check=checks))
