"""True shapes of known models, to be filled with random weights: speed and memory do not depend on the values."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tda_export.bench.random_model import byte_tokenizer
from tda_export.errors import UsageError, first_line
from tda_export.models.families import read_spec
from tda_export.models.skeleton import skeleton_shapes
from tda_export.models.source import ModelSource
from tda_export.models.spec import DecoderSpec
from tda_export.models.weights import Weights

# Fields of config.json; missing fields take the family's defaults.
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "opt-350m": {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": 1024,
        "ffn_dim": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "word_embed_proj_dim": 512,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": False,
        "tie_word_embeddings": True,
    },
    "opt-2.7b": {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": 2560,
        "ffn_dim": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "word_embed_proj_dim": 2560,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "gemma-2b": {
        "model_type": "gemma",
        "vocab_size": 256000,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "qwen2.5-1.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "llama-2-7b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    "llama-2-13b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "max_position_embeddings": 4096,
    },
    "mistral-7b": {
        "model_type": "mistral",
        "vocab_size": 32768,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "sliding_window": None,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "llama-3-70b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
}
POOL_NUMBERS = 1 << 24  # number of random numbers from which all tensors are cut
POOL_STEP = 1_000_003  # a prime: the distance between the starts of consecutive tensors


class RandomWeights:
    """Tensors of given shapes, cut from one pool of normal numbers and scaled so that activations keep their size."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], seed: int = 0) -> None:
        self._shapes = shapes
        self._starts = {name: number * POOL_STEP % POOL_NUMBERS for number, name in enumerate(shapes)}
        self._pool = torch.randn(POOL_NUMBERS, generator=torch.Generator().manual_seed(seed))

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def load(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        size = int(torch.Size(shape).numel())
        first = self._pool[self._starts[name] :][:size]
        numbers = torch.cat([first, *[self._pool] * -(-(size - len(first)) // POOL_NUMBERS)])[:size].view(shape)
        if len(shape) == 1:
            return 0.1 * numbers if name.endswith(".bias") else 1 + 0.1 * numbers
        return numbers * shape[1] ** -0.5


@dataclass(frozen=True)
class RandomSource(ModelSource):
    """A model of a true shape with random weights and the byte tokenizer; it has no checkpoint and no reference."""

    fields: tuple[tuple[str, Any], ...] = ()

    @cached_property
    def config(self) -> Any:
        from transformers import AutoConfig

        fields = dict(self.fields)
        model_type = fields.pop("model_type")
        try:
            return AutoConfig.for_model(model_type, **fields)
        except Exception as error:  # transformers raises many kinds of errors
            raise UsageError(f"{self.name}: not a usable config.json ({first_line(error)}).") from error

    @cached_property
    def spec(self) -> DecoderSpec:
        return read_spec(self.config)

    @cached_property
    def tokenizer(self) -> Any:
        return byte_tokenizer()

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        return {}

    @cached_property
    def fingerprint(self) -> str:
        return "random weights"

    def weights(self) -> Weights:
        return RandomWeights(skeleton_shapes(self.config))


def random_source(shape: str) -> RandomSource:
    """Make a random model of a named shape, or of the shape that a config.json describes.

    Raises:
        UsageError: `shape` is neither a known name nor a readable file.
    """
    if shape in SHAPES:
        return RandomSource(shape, Path(), fields=tuple(SHAPES[shape].items()))
    path = Path(shape)
    if not path.is_file():
        raise UsageError(f"Unknown shape {shape!r}. Give a config.json, or one of {', '.join(SHAPES)}.")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(fields.get("model_type"), str):
            raise ValueError("no model_type")
    except (ValueError, AttributeError, RecursionError) as error:
        raise UsageError(f"{shape}: not a readable config.json ({first_line(error)}).") from error
    return RandomSource(path.parent.name or shape, Path(), fields=tuple(fields.items()))
