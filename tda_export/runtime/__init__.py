"""Run artifacts with ONNX Runtime. Needs numpy, onnxruntime, tokenizers and jinja2; never PyTorch or transformers.

>>> from tda_export.runtime import load
>>> model = load("artifacts/smollm2-135m")
>>> for token in model.generate("The sea is"):
...     print(token.text, end="")
"""

from tda_export.runtime.artifact import Artifact, open_artifact
from tda_export.runtime.conversation import Conversation
from tda_export.runtime.generate import Generation, Metrics, Token
from tda_export.runtime.model import Model, load
from tda_export.runtime.sampling import Sampling

__all__ = ["Artifact", "Conversation", "Generation", "Metrics", "Model", "Sampling", "Token", "load", "open_artifact"]
