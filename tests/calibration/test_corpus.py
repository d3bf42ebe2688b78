"""Datasets of every kind become sequences of one length."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from tda_export.bench.random_model import byte_tokenizer
from tda_export.calibration import corpus as corpus_module
from tda_export.calibration.corpus import (
    BUILTIN,
    PIECE_CHARACTERS_PER_TOKEN,
    SHUFFLE_BUFFER,
    Corpus,
    builtin_folder,
    load_corpus,
)
from tda_export.errors import TdaError, UsageError

TOKENIZER = byte_tokenizer()  # one token a byte, and no token before a text
MARKER = "<|document|>"  # the line between two documents of a text file
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def load(dataset: object, **options: Any) -> Corpus:
    defaults = {
        "tokenizer": TOKENIZER,
        "text_column": None,
        "sequences": 100,
        "length": 4,
        "seed": 0,
        "vocab_size": 259,
    }
    return load_corpus(str(dataset), **(defaults | options))


def test_token_that_the_model_does_not_have_is_named(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<image_soft_token>"])
    (tmp_path / "text.txt").write_text("abcdefg<image_soft_token>hijkl")
    assert len(load(tmp_path / "text.txt", tokenizer=tokenizer, vocab_size=260).tokens)
    message = (
        r"text\.txt: the text contains '<image_soft_token>', token 259 of the tokenizer, and the model's vocabulary "
        r"ends at 258\. Remove it from the text\.$"
    )
    with pytest.raises(UsageError, match=message):
        load(tmp_path / "text.txt", tokenizer=tokenizer)


def texts(corpus: Corpus) -> list[str]:
    return [TOKENIZER.decode(row) for row in corpus.tokens]


class Recorder:
    """A byte tokenizer that records its texts."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, text: str, **options: Any) -> Any:
        self.texts.append(text)
        return TOKENIZER(text, **options)


def pieces(dataset: object, **options: Any) -> list[str]:
    """Return the pieces of a dataset in their shuffled order, by default all of them."""
    recorder = Recorder()
    load(dataset, tokenizer=recorder, **({"sequences": 10_000} | options))
    assert recorder.texts[:2] == ["", "\n\n"]  # the beginning of a sequence, and the text between two pieces
    return recorder.texts[2:]


def write_documents(path: Path, documents: list[str]) -> Path:
    path.write_text(f"\n{MARKER}\n".join(documents), encoding="utf-8")
    return path


# The built-in text


def test_builtin_text_is_large_and_of_many_genres() -> None:
    files = sorted(builtin_folder().glob("*.txt"))
    assert len(files) >= 8
    assert sum(file.stat().st_size for file in files) >= 64 * 1024


def test_builtin_text_matches_its_hashes() -> None:
    lines = (builtin_folder() / "SHA256SUMS").read_text().splitlines()
    listed = {name: digest for digest, name in (line.split("  ") for line in lines)}
    there = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in builtin_folder().glob("*.txt")}
    assert there == listed


def test_builtin_separators_are_well_formed() -> None:
    for file in builtin_folder().glob("*.txt"):
        text = file.read_bytes().decode("utf-8")
        documents = text.split(f"\n{MARKER}\n")
        assert len(documents) > 1, file
        assert MARKER not in "".join(documents), file
        assert all(document.strip() for document in documents), file
        assert "\r" not in text, file
        assert text.endswith("\n"), file


def test_builtin_corpus_draws_from_every_file() -> None:
    corpus = load(BUILTIN, sequences=10_000, length=64)
    assert corpus.name == BUILTIN
    drawn = texts(corpus)
    for file in builtin_folder().glob("*.txt"):
        assert any(text in file.read_text(encoding="utf-8") for text in drawn), file
    assert not any(MARKER in text for text in drawn)


def test_missing_builtin_text_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(corpus_module, "__file__", str(tmp_path / "package" / "calibration" / "corpus.py"))
    with pytest.raises(TdaError, match=r"^The built-in calibration text is missing .+ Reinstall tda-export\.$"):
        builtin_folder()


# Every format


def write_format(folder: Path, suffix: str, column: str, rows: list[str | None]) -> Path:
    path = folder / f"data{suffix}"
    if suffix == ".txt":
        return write_documents(path, [row or "" for row in rows])
    table = pyarrow.table({"number": list(range(len(rows))), column: pyarrow.array(rows, pyarrow.string())})
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()), encoding="utf-8")
    return path


ROWS: list[str | None] = ["first", None, 'sécond, with "quotes"', "   ", "third\nof two lines"]
DOCUMENTS = ["first", 'sécond, with "quotes"', "third\nof two lines"]  # ROWS without the blank ones


@pytest.mark.parametrize("suffix", [".txt", ".TXT", ".jsonl", ".csv", ".parquet"])
def test_every_format_gives_the_same_documents(suffix: str, tmp_path: Path) -> None:
    path = write_format(tmp_path, suffix.lower(), "text", ROWS).rename(tmp_path / f"named{suffix}")
    assert sorted(pieces(path, length=8)) == DOCUMENTS


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_text_column_is_chosen_by_name(suffix: str, tmp_path: Path) -> None:
    path = write_format(tmp_path, suffix, "body", ROWS)
    assert sorted(pieces(path, text_column="body", length=8)) == DOCUMENTS
    message = rf"data\{suffix}: no column 'text'; the columns are number, body\. Choose one with --text-column\.$"
    with pytest.raises(UsageError, match=message):
        load(path)
    with pytest.raises(UsageError, match="no column 'txet'; the columns are number, body"):
        load(path, text_column="txet")


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_documents(tmp_path / "notes.txt", ["a document"])
    assert pieces("~/notes.txt") == ["a document"]


@pytest.mark.parametrize(
    "text",
    [
        "aaaa\n<|document|>\nbbbb",
        "aaaa\r\n<|document|>\r\nbbbb\r\n",
        "\n\naaaa\n\n<|document|>\n\n\nbbbb\n\n",
        "<|document|>\naaaa\n<|document|>\nbbbb\n<|document|>\n",
        "aaaa\n<|document|>\n<|document|>\nbbbb\n<|document|>",
    ],
    ids=["plain", "windows", "blank-lines", "at-the-ends", "twice"],
)
def test_separators_never_get_into_a_document(text: str, tmp_path: Path) -> None:
    path = tmp_path / "documents.txt"
    path.write_bytes(text.encode())
    assert sorted(pieces(path)) == ["aaaa", "bbbb"]


def test_a_marker_within_a_line_is_text(tmp_path: Path) -> None:
    (tmp_path / "quoted.txt").write_text(f"see {MARKER} here")
    assert pieces(tmp_path / "quoted.txt") == [f"see {MARKER} here"]


# Pieces


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6), length=st.integers(1, 6), seed=st.integers(0, 9))
def test_documents_are_cut_into_pieces_of_eight_characters_a_token(
    sizes: list[int], length: int, seed: int, tmp_path: Path
) -> None:
    """Every document repeats one letter, so that a piece shows its document."""
    documents = [letter * size for letter, size in zip(ALPHABET, sizes, strict=False)]
    path = write_documents(tmp_path / "letters.txt", [*documents, "z" * length])  # enough for one sequence
    limit = PIECE_CHARACTERS_PER_TOKEN * length
    expected = [d[i : i + limit] for d in [*documents, "z" * length] for i in range(0, len(d), limit)]
    assert sorted(pieces(path, length=length, seed=seed)) == sorted(expected)


def test_pieces_of_a_long_document_are_shuffled_among_the_others(tmp_path: Path) -> None:
    """Documents are cut before the shuffle, so that a book does not fill the corpus alone."""
    assert SHUFFLE_BUFFER == 1_000
    limit = 4 * PIECE_CHARACTERS_PER_TOKEN
    path = write_documents(tmp_path / "books.txt", [letter * (20 * limit) for letter in "ab"])
    order = "".join(piece[0] for piece in pieces(path))
    assert sorted(order) == ["a"] * 20 + ["b"] * 20
    assert set(order[:20]) == {"a", "b"}


def test_shuffling_reaches_as_far_as_the_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_documents(tmp_path / "letters.txt", [letter * 4 for letter in ALPHABET])
    in_order = [letter * 4 for letter in ALPHABET]
    assert pieces(path) != in_order
    monkeypatch.setattr(corpus_module, "SHUFFLE_BUFFER", 1)
    assert pieces(path) == in_order


def test_surroundings_of_documents_and_pieces_are_stripped(tmp_path: Path) -> None:
    limit = 4 * PIECE_CHARACTERS_PER_TOKEN
    rows = ["\n\n  indented\n  again \t\n\n", "a" * (limit - 3) + "   \n" + "b" * 5]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    assert sorted(pieces(path)) == ["a" * (limit - 3), "bbbbb", "indented\n  again"]


# Sequences


def slow_sequences(texts_in_order: list[str], size: int, sequences: int) -> list[str]:
    """Return the sequences of pieces in this order: the starts of long ones, then cuts of the rest as one string."""
    starts = [text[:size] for text in texts_in_order if len(text) >= size]
    left = ""
    for text in texts_in_order:
        if rest := text[size:] if len(text) >= size else text:
            left += ("\n\n" if len(left) % size else "") + rest  # no blank line at the beginning of a sequence
    return (starts + [left[i : i + size] for i in range(0, len(left) - size + 1, size)])[:sequences]


@settings(deadline=None, max_examples=150)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=len(ALPHABET)),
    length=st.integers(1, 12),
    sequences=st.integers(1, 12),
)
def test_sequences_are_cut_and_joined_as_documented(sizes: list[int], length: int, sequences: int) -> None:
    documents = [letter * size for letter, size in zip(ALPHABET, sizes, strict=False)]
    expected = slow_sequences(documents, length, sequences)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "_documents", lambda *arguments: iter(documents))
        if not expected:
            with pytest.raises(TdaError, match=rf"^letters: {sum(sizes)} tokens of text, but one sequence takes"):
                load("letters", length=length, sequences=sequences)
            return
        corpus = load("letters", length=length, sequences=sequences)
    assert corpus.tokens.dtype == torch.int64
    assert corpus.tokens.shape == (len(expected), length)  # nothing is padded
    assert texts(corpus) == expected


def test_no_more_is_read_than_is_needed(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "letters.txt", [letter * 4 for letter in ALPHABET])
    assert len(pieces(path, sequences=3)) == 3


def test_each_piece_gives_one_sequence_while_there_are_enough(tmp_path: Path) -> None:
    limit = 4 * PIECE_CHARACTERS_PER_TOKEN
    path = write_documents(tmp_path / "documents.txt", ["a" * limit, "b" * (2 * limit), "c" * (limit + 3)])
    assert sorted(texts(load(path, sequences=4))) == ["aaaa", "bbbb", "bbbb", "cccc"]


def test_short_documents_are_joined_by_a_blank_line(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "short.txt", ["ab"] * 4)
    assert texts(load(path, length=6)) == ["ab\n\nab", "ab\n\nab"]
    assert texts(load(path, length=5)) == ["ab\n\na", "b\n\nab"]  # the fourth document is too short for a sequence


def test_a_token_before_every_text_begins_each_sequence(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, begin)]
    )
    path = write_documents(tmp_path / "documents.txt", ["abcdef", "gh", "ij", "kl"])
    corpus = load(path, tokenizer=tokenizer)
    assert len(corpus.tokens) > 3
    assert corpus.tokens[:, 0].tolist() == [begin] * len(corpus.tokens)
    assert (corpus.tokens[:, 1:] != begin).all()  # neither a later piece nor the blank line adds another
    assert tokenizer.decode(corpus.tokens[0, 1:]) == "abc"


# The seed


def test_seed_decides_order_and_nothing_else(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "letters.txt", [letter * 4 for letter in ALPHABET])
    first, again, other = load(path, seed=1), load(path, seed=1), load(path, seed=2)
    assert torch.equal(first.tokens, again.tokens)
    assert first.sha256 == again.sha256
    assert texts(first) != texts(other)
    assert sorted(texts(first)) == sorted(texts(other)) == [letter * 4 for letter in ALPHABET]
    assert first.sha256 != other.sha256


def test_fewer_sequences_are_the_first_ones(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "letters.txt", [letter * 4 for letter in ALPHABET])
    assert torch.equal(load(path, sequences=5).tokens, load(path).tokens[:5])


def test_description_is_provenance(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "letters.txt", ["abcd", "efgh"])
    corpus = load(path)
    digest = hashlib.sha256(corpus.tokens.numpy().tobytes()).hexdigest()
    assert corpus.describe() == {"name": str(path), "sequences": 2, "tokens_sha256": digest}
