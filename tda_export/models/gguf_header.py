"""What a GGUF file says that transformers passes over, or leaves out that transformers fills with another model's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tda_export.errors import TdaError
from tda_export.models.config_sizes import check_sizes
from tda_export.models.gguf_file import TOKENS, GgufHeader

# Tensors that scale the rotary embedding: of llama3, and of longrope.
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
ROPE_TYPE = "rope.scaling.type"
# Without a type the scaling is linear; the second is what older files call the factor.
ROPE_LINEAR = ("rope.scaling.factor", "rope.scale_linear")
WINDOW = "attention.sliding_window"
READ_WINDOWS = ("gemma2", "gemma3")  # whose window transformers does read
# The largest of these divide attention by another number than their head size's root, which no key says; by blocks.
OTHER_ATTENTION_SCALE = {"gemma2": 46, "gemma3": 62}
# What every file says; transformers takes the sizes of its default model for those that are not there.
NEEDED = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")


class Unread(NamedTuple):
    """Something of a model that would be lost, and the place in the file that says so."""

    what: str
    where: str


def check_gguf_header(header: GgufHeader, name: str) -> None:
    """Refuse a GGUF file of which transformers would make another model.

    Args:
        header: Of the file.
        name: The model's, for the message.

    Raises:
        TdaError: A size is missing or cannot be, or rope scaling, sliding window or attention scale would be lost.
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
