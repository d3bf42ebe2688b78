"""What a GGUF file says that transformers passes over, so that the model would be computed wrongly without an error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tda_export.errors import TdaError

# Tensors that scale the rotary embedding: of llama3, and of longrope.
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
ROPE_TYPE = "rope.scaling.type"
# Without a type the scaling is linear; the second is what older files call the factor.
ROPE_LINEAR = ("rope.scaling.factor", "rope.scale_linear")
WINDOW = "attention.sliding_window"
READ_WINDOWS = ("gemma2", "gemma3")  # whose window transformers does read
# The largest of these divide attention by another number than their head size's root, which no key says; by blocks.
OTHER_ATTENTION_SCALE = {"gemma2": 46, "gemma3": 62}


class Unread(NamedTuple):
    """Something of a model that would be lost, and the place in the file that says so."""

    what: str
    where: str


def refuse_unread(path: Path, name: str) -> None:
    """Refuse a GGUF file that says what transformers does not read.

    Args:
        path: The file.
        name: The model's, for the message.

    Raises:
        TdaError: Its rope scaling, sliding window or attention scale would be lost.
        Exception: Of any kind, if the file is damaged.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    for unread in _unread(reader):
        raise TdaError(
            f"{name}: its {unread.what} ({unread.where}) is not read from GGUF files. "
            "Give the safetensors checkpoint of this model."
        )


def _unread(reader: Any) -> Iterator[Unread]:
    architecture = _value(reader, "general.architecture")

    def of_model(key: str) -> Any:
        return _value(reader, f"{architecture}.{key}")

    for tensor in reader.tensors:
        if tensor.name in ROPE_FACTORS:
            yield Unread("rope scaling", tensor.name)
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


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()
