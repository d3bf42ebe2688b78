"""Fixtures: the tiny artifact, loaded, and copies of it."""

from tests.runtime.conftest import artifact_copy, model

__all__ = ["artifact_copy", "model"]
