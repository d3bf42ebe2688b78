"""Refuse GGUF files with values that transformers ignores, or without values that transformers would fill from another
model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tda_export.errors import TdaError
from tda_export.models.config_sizes import check_sizes
from tda_export.models.gguf_file import TOKENS, GgufHeader

# Tensors that scale the rotary embedding: for llama3, and for longrope.
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
ROPE_TYPE = "rope.scaling.type"
# Without a type the scaling is linear; the second key is the factor's name in older files.
ROPE_LINEAR = ("rope.scaling.factor", "rope.scale_linear")
WINDOW = "attention.sliding_window"
READ_WINDOWS = ("gemma2", "gemma3")  # architectures whose window transformers does read
# The largest of these models do not scale attention by their head size's root, which no key says; by number of blocks.
OTHER_ATTENTION_SCALE = {"gemma2": 46, "gemma3": 62}
# Keys of every file; transformers takes missing sizes from its default model.
NEEDED = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")


class Unread(NamedTuple):
    """A feature of a model that would be lost, and the place in the file that specifies it."""

    what: str
    where: str


def check_gguf_header(header: GgufHeader, name: str) -> None:
    """Refuse a GGUF file that transformers would read as a different model.

    Args:
        header: The file's header.
        name: The model's name, for the message.

    Raises:
        TdaError: A size is missing or impossible, or rope scaling, sliding window or attention scale would be lost.
    """
    _refuse_incomplete(header, name)
    for unread in _unread(header):
        raise TdaError(
            f"{name}: its {unread.what} ({unread.where}) is not read from GGUF files. "
            "Give the safetensors checkpoint of this model."
        )


def _refuse_incomplete(header: GgufHeader, name: str) -> None:
    architecture = header.architecture
    present = header.values.keys() | header.lengths.keys()
    missing = [key for key in NEEDED if f"{architecture}.{key}" not in present]
    if not any(f"{architecture}.{key}" in present for key in EPSILONS):
        missing.append(EPSILONS[0])
    if missing:
        raise TdaError(
            f"{name}: the GGUF file does not say {architecture}.{missing[0]}, which every model needs. "
            "Give another GGUF file or the safetensors checkpoint of this model."
        )
    if f"{architecture}.vocab_size" not in present and TOKENS not in present:
        raise TdaError(
            f"{name}: the GGUF file says neither {architecture}.vocab_size nor {TOKENS}. "
            "Give another GGUF file or the safetensors checkpoint of this model."
        )
    start = f"{architecture}."
    sizes = {key.removeprefix(start): value for key, value in header.values.items() if key.startswith(start)}
    check_sizes(sizes, name, f"its {architecture} keys")


def _unread(header: GgufHeader) -> Iterator[Unread]:
    architecture, of_model = header.architecture, header.of_model
    for tensor in header.tensors:
        if tensor in ROPE_FACTORS:
            yield Unread("rope scaling", tensor)
    kind = of_model(ROPE_TYPE)
    if kind not in (None, "none"):
        yield Unread("rope scaling", f"{architecture}.{ROPE_TYPE} = {kind}")
    if kind is None:
        for key in ROPE_LINEAR:
            if of_model(key) not in (None, 0, 1):
                yield Unread("rope scaling", f"{architecture}.{key} = {of_model(key)}")
    window = of_model(WINDOW) or 0
    if architecture not in READ_WINDOWS and 0 < window < (of_model("context_length") or window + 1):
        yield Unread("sliding window", f"{architecture}.{WINDOW} = {window}")
    blocks = of_model("block_count")
    if blocks is not None and blocks == OTHER_ATTENTION_SCALE.get(architecture):
        yield Unread("attention scale", f"{architecture} with {blocks} blocks")
