"""Check the sizes in a checkpoint's configuration before anything is allocated by them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tda_export.errors import TdaError, shown

LARGEST_SIZE = 1 << 24
MOST_LAYERS = 10_000

LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "block_count")
SIZES = (
    "vocab_size",
    "hidden_size",
    "n_embd",
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "n_positions",
    "original_max_position_embeddings",
    "word_embed_proj_dim",
    # fields of GGUF files, after the architecture's name
    "embedding_length",
    "feed_forward_length",
    "context_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "rope.dimension_count",
)
LIMITS = dict.fromkeys(SIZES, LARGEST_SIZE) | dict.fromkeys(LAYERS, MOST_LAYERS)


def check_sizes(config: Mapping[str, Any], name: str, place: str) -> None:
    """Refuse a configuration with an invalid size.

    Args:
        config: Fields by name. Fields that are not sizes are ignored; None means that a field is absent.
        name: The model's name, for the message.
        place: What the fields belong to, for the message.

    Raises:
        TdaError: A size is not a whole number, is under 1, or is beyond any model's; the message names the field.
    """
    for field, limit in LIMITS.items():
        value = config.get(field)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise TdaError(
                f"{name}: {field} in {place} is {shown(repr(value), 40)}, which is not a whole "
                f"number from 1 to {limit:,}. Correct it, or give another copy of the model."
            )
