"""The tiny artifact, loaded, beside the model that it was built from."""

from tests.runtime.conftest import model, priced_model, reference, source

__all__ = ["model", "priced_model", "reference", "source"]
