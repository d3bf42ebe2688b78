"""The tiny artifact, loaded."""

from tests.runtime.conftest import model

__all__ = ["model"]
