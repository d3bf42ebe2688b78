"""The tokenizer of a GGUF file splits text like the model's own tokenizer, or is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from tda_export.errors import TdaError
from tda_export.models.gguf_file import read_gguf_header
from tda_export.models.gguf_tokenizer import AS_GPT2, SINGLE_DIGITS, WHOLE_PIECES, correct_gguf_tokenizer
from tda_export.models.source import resolve_model

LINES = "Steps:\n\n1. Wash 23\n\n2. Dry  7"
MERGES = ["Ċ Ċ", "Ġ Ġ", "Ġ 2", "1 .", "2 3", "ĊĊ 2", "Ġ W", "a b"]
# One token that no merges give.
TOKENS = [
    "<s>",
    "</s>",
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    *(merge.replace(" ", "") for merge in MERGES),
    "xyz",
]
CONTROL, NORMAL = 3, 1


def write_tokenizer(
    path: Path, pre: str | None, *, architecture: str = "llama", model: str = "gpt2", **flags: bool
) -> Any:
    """Write a GGUF file of a tokenizer alone, and return the tokenizer made from it."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS if model == "gpt2" else ["<s>", "</s>", "▁", "a", "b", "▁a"])
    if model == "gpt2":
        writer.add_token_types([CONTROL, CONTROL, *[NORMAL] * (len(TOKENS) - 2)])
        writer.add_token_merges(MERGES)
    else:
        writer.add_token_scores([0.0, 0.0, -1.0, -2.0, -3.0, -0.5])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for flag, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{flag}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return resolve_model(str(path)).tokenizer


def expected_ids(split: pre_tokenizers.PreTokenizer, *, whole: bool = False) -> list[int]:
    """Tokenize LINES with a tokenizer made by hand."""
    vocabulary = {token: number for number, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(m.split(" ")) for m in MERGES], ignore_merges=whole))
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    return list(tokenizer.encode(LINES).ids)


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL])


@pytest.mark.parametrize("pre", sorted(SINGLE_DIGITS))
def test_every_digit_alone(pre: str, tmp_path: Path) -> None:
    ids = write_tokenizer(tmp_path / "model.gguf", pre)(LINES).input_ids
    assert ids == expected_ids(DIGITS)
    assert ids != expected_ids(BYTE_LEVEL)
    assert TOKENS.index("ĊĊ") in ids


@pytest.mark.parametrize("pre", sorted(AS_GPT2))
def test_gpt2(pre: str, tmp_path: Path) -> None:
    assert write_tokenizer(tmp_path / "model.gguf", pre)(LINES).input_ids == expected_ids(BYTE_LEVEL)


def test_file_of_gpt2_need_not_name_its_splitting(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "model.gguf", None, architecture="gpt2")
    assert tokenizer(LINES).input_ids == expected_ids(BYTE_LEVEL)


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "smaug-bpe", "gpt-4o"])
def test_names_that_transformers_knows(pre: str, tmp_path: Path) -> None:
    pattern = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[pre]), behavior="isolated")
    split = pre_tokenizers.Sequence([pattern, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    ids = write_tokenizer(tmp_path / "model.gguf", pre, add_bos_token=False)(LINES).input_ids
    assert ids == expected_ids(split, whole=pre in WHOLE_PIECES)


@pytest.mark.parametrize("pre", ["falcon", "deepseek-llm", "bloom", "command-r", "unheard-of", "Smollm"])
def test_splitting_that_nobody_here_knows_is_refused_by_name(pre: str, tmp_path: Path) -> None:
    message = (
        rf"model\.gguf: its tokenizer splits text as '{re.escape(pre)}' \(tokenizer\.ggml\.pre\), which is not read "
        r"from GGUF files\. Give the Hugging Face folder of this model \(safetensors with tokenizer\.json\)\.$"
    )
    with pytest.raises(TdaError, match=message):
        write_tokenizer(tmp_path / "model.gguf", pre)


@pytest.mark.parametrize("pre", [None, "default"])
def test_file_that_does_not_say_how_text_is_split_is_refused(pre: str | None, tmp_path: Path) -> None:
    with pytest.raises(TdaError, match=r"its tokenizer names no splitting of text \(tokenizer\.ggml\.pre\), which"):
        write_tokenizer(tmp_path / "model.gguf", pre)


def test_piece_that_is_a_token_needs_no_merges(tmp_path: Path) -> None:
    whole = write_tokenizer(tmp_path / "model.gguf", "llama-bpe", add_bos_token=False)
    merged = write_tokenizer(tmp_path / "other.gguf", "qwen2")
    assert whole("xyz").input_ids == [TOKENS.index("xyz")]
    assert len(merged("xyz").input_ids) == 3


@pytest.mark.parametrize(
    ("flags", "begins"), [({}, True), ({"add_bos_token": False}, False), ({"add_bos_token": True}, True)]
)
def test_first_token_of_llama_3(flags: dict[str, bool], begins: bool, tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "model.gguf", "llama-bpe", **flags)
    assert (tokenizer("a").input_ids[0] == 0) == begins
    assert (tokenizer.backend_tokenizer.encode("a").ids[0] == 0) == begins


def test_sentencepiece_needs_no_name(tmp_path: Path) -> None:
    for pre in ("default", None):
        assert write_tokenizer(tmp_path / "model.gguf", pre, model="llama")("a").input_ids == [0, 5]


def test_sentencepiece_without_the_space_before_a_text(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "model.gguf", None, model="llama", add_space_prefix=False)
    assert tokenizer("a").input_ids == [0, 3]
    assert tokenizer("a a").input_ids == [0, 3, 5]
    assert tokenizer.backend_tokenizer.decode([5, 3]) == " aa"


def test_releases_that_make_a_unigram_model_of_merges_are_refused(tmp_path: Path) -> None:
    """transformers 5.17 reads files of Gemma so: "Listen" became "List" and "en", and BOS was left out."""
    tokenizer = write_tokenizer(tmp_path / "model.gguf", None, model="llama")
    tokenizer.backend_tokenizer.model = models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0, byte_fallback=False)
    header = read_gguf_header(tmp_path / "model.gguf")
    message = (
        r"^gemma\.gguf: transformers [\d.]+ splits the text of such a GGUF file wrongly \(as Unigram\)\. Update "
        r"transformers to 5\.23, or give the Hugging Face folder of this model \(safetensors with tokenizer\.json\)\.$"
    )
    with pytest.raises(TdaError, match=message):
        correct_gguf_tokenizer(tokenizer, header, "gemma.gguf")


@pytest.mark.real_model
def test_builtin_model_splits_as_its_own_tokenizer() -> None:
    tokenizer = resolve_model("smollm2-135m").tokenizer
    assert tokenizer("Steps:\n\n1. Wash\n\n2. Dry").input_ids == [21831, 42, 1116, 33, 30, 21886, 1116, 34, 30, 16999]
    assert tokenizer("Hello world! 123").input_ids == [19556, 905, 17, 216, 33, 34, 35]
    assert tokenizer("  multiple   spaces").input_ids == [216, 2701, 256, 5600]
