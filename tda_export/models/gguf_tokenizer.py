"""Correct the tokenizer of a GGUF file where transformers reads it incompletely or would split text wrongly.

A GGUF file names how text is split before byte-level BPE (`tokenizer.ggml.pre`) but holds no rule. transformers knows
some of the names and silently uses GPT-2's splitting for all others. The names and their meanings are llama.cpp's,
which writes them.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from tokenizers import decoders, models, pre_tokenizers

from tda_export.errors import TdaError
from tda_export.models.gguf_file import GgufHeader

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"  # values of tokenizer.ggml.model
MODEL, PRE = "tokenizer.ggml.model", "tokenizer.ggml.pre"
ADD_BOS, ADD_SPACE_PREFIX = "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix"

# Every digit stands alone, then GPT-2's splitting.
SINGLE_DIGITS = {"smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b", "mellum2"}
# GPT-2's splitting, transformers' fallback.
AS_GPT2 = {"gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "trillion", "granite-docling"}
# A piece that is a token is not split by merging, and BOS is added unless the file says otherwise.
WHOLE_PIECES = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}

KNOWN_TO_OLDER_RELEASES = {"llama-bpe", "llama3", "llama-v3", "qwen2"}


def correct_gguf_tokenizer(tokenizer: Any, header: GgufHeader, name: str) -> None:
    """Make transformers' tokenizer of a GGUF file split text as the model's own tokenizer does, or refuse it.

    Args:
        tokenizer: The tokenizer that transformers made from the file; it is modified.
        header: Of the file.
        name: The model's name, for the message.

    Raises:
        TdaError: It is unknown how this model splits text.
    """
    value, backend = header.values.get, tokenizer.backend_tokenizer
    if value(MODEL) == SENTENCEPIECE:
        if isinstance(backend.model, models.Unigram):  # its pieces are merged, as in BPE; their scores are ranks
            raise TdaError(
                f"{name}: transformers {version('transformers')} splits the text of such a GGUF file wrongly (as "
                "Unigram). Update transformers to 5.23, or give the Hugging Face folder of this model (safetensors "
                "with tokenizer.json)."
            )
        if value(ADD_SPACE_PREFIX) is False:
            _leave_out_prefix(backend)
        return
    pre = value(PRE)
    if value(MODEL) != BYTE_LEVEL:
        return
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in AS_GPT2 or (pre is None and header.architecture == "gpt2"):
        backend.pre_tokenizer = gpt2
    elif pre in SINGLE_DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    elif pre not in _known_to_transformers():
        said = "names no splitting of text" if pre in (None, "default") else f"splits text as {pre!r}"
        raise TdaError(
            f"{name}: its tokenizer {said} ({PRE}), which is not read from GGUF files. "
            "Give the Hugging Face folder of this model (safetensors with tokenizer.json)."
        )
    if pre in WHOLE_PIECES:
        backend.model.ignore_merges = True
        if value(ADD_BOS) is None:
            tokenizer.add_bos_token = True


def _known_to_transformers() -> set[str]:
    """Return the names that the installed release of transformers has a splitting for."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # releases that choose only by architecture
        return KNOWN_TO_OLDER_RELEASES
    return set(GGUF_PRE_TOKENIZER_SPLITS)


def _leave_out_prefix(backend: Any) -> None:
    """Remove the space that transformers puts before a text for every SentencePiece vocabulary of this kind."""
    split = backend.pre_tokenizer
    if not isinstance(split, pre_tokenizers.Metaspace) or split.prepend_scheme == "never":
        return
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split.replacement, prepend_scheme="never", split=split.split)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(split.replacement, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
