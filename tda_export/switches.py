"""Environment variables that turn a part of the program off."""

from __future__ import annotations

import os

from tda_export.errors import UsageError, shown


def switched_on(name: str) -> bool:
    """Return whether a part is on: its variable is unset, empty or 1, and not 0.

    Raises:
        UsageError: The variable has another value.
    """
    given = os.environ.get(name) or "1"
    if given not in ("0", "1"):
        raise UsageError(f"{name}={shown(given)}: give 0, or leave it out.")
    return given == "1"
