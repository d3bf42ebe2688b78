"""The tiny artifact, loaded, beside the model that it was built from."""

from tests.runtime.conftest import model, reference, source

__all__ = ["model", "reference", "source"]
