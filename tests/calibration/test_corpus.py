"""From datasets of every kind to sequences of one length."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator
from itertools import groupby
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
    Corpus,
    builtin_folder,
    load_corpus,
)
from tda_export.errors import TdaError, UsageError

TOKENIZER = byte_tokenizer()  # one token a byte, none before a text
MARKER = "<|document|>"  # the line between two documents of a text file
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(autouse=True, scope="module")
def _no_sleep() -> Iterator[None]:
    """Spare the five seconds that `datasets` sleeps whenever a Parquet stream ends or is collected."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
        yield
        gc.collect()


def load(dataset: object, **options: Any) -> Corpus:
    defaults = {"tokenizer": TOKENIZER, "text_column": None, "sequences": 100, "length": 4, "seed": 0}
    return load_corpus(str(dataset), **(defaults | options))


def texts(corpus: Corpus) -> list[str]:
    return [TOKENIZER.decode(row) for row in corpus.tokens]


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


@pytest.mark.parametrize("suffix", [".txt", ".TXT", ".jsonl", ".csv", ".parquet"])
def test_every_format_gives_the_same_documents(suffix: str, tmp_path: Path) -> None:
    corpus = load(write_format(tmp_path, suffix.lower(), "text", ROWS).rename(tmp_path / f"named{suffix}"))
    assert sorted(texts(corpus)) == ["firs", "séc", "thir"]  # é is two bytes


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_text_column_is_chosen_by_name(suffix: str, tmp_path: Path) -> None:
    path = write_format(tmp_path, suffix, "body", ROWS)
    assert sorted(texts(load(path, text_column="body"))) == ["firs", "séc", "thir"]
    message = rf"data\{suffix}: no column 'text'; the columns are number, body\. Choose one with --text-column\.$"
    with pytest.raises(UsageError, match=message):
        load(path)
    with pytest.raises(UsageError, match="no column 'txet'; the columns are number, body"):
        load(path, text_column="txet")


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_documents(tmp_path / "notes.txt", ["a document"])
    assert texts(load("~/notes.txt")) == ["a do"]


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
    assert sorted(texts(load(path, length=3))) == ["aaa", "bbb"]


def test_a_marker_within_a_line_is_text(tmp_path: Path) -> None:
    (tmp_path / "quoted.txt").write_text(f"see {MARKER} here")
    assert texts(load(tmp_path / "quoted.txt", length=10)) == ["see <|docu"]


# Sequences


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=len(ALPHABET)),
    length=st.integers(1, 6),
    sequences=st.integers(1, 8),
    seed=st.integers(0, 100),
)
def test_sequences_are_cut_and_joined_as_documented(
    sizes: list[int], length: int, sequences: int, seed: int, tmp_path: Path
) -> None:
    """Every document is one letter, so that each run of letters in a sequence shows which document it came from."""
    path = write_documents(tmp_path / "letters.txt", [a * n for a, n in zip(ALPHABET, sizes, strict=False)])
    size_of = dict(zip(ALPHABET, sizes, strict=False))
    limit = PIECE_CHARACTERS_PER_TOKEN * length
    pieces = {a: [min(limit, n - start) for start in range(0, n, limit)] for a, n in size_of.items()}
    if sum(sizes) < length:
        with pytest.raises(TdaError, match="tokens of text"):
            load(path, length=length, sequences=sequences, seed=seed)
        return

    corpus = load(path, length=length, sequences=sequences, seed=seed)
    assert corpus.tokens.dtype == torch.int64
    assert corpus.tokens.shape[1] == length
    whole = sum(piece >= length for sizes_of_pieces in pieces.values() for piece in sizes_of_pieces)
    short = sum(piece for sizes_of_pieces in pieces.values() for piece in sizes_of_pieces if piece < length)
    assert min(sequences, whole) <= len(corpus.tokens) <= min(sequences, whole + short // length)
    for text in texts(corpus):
        runs = [(letter, len(list(run))) for letter, run in groupby(text)]
        if len(runs) == 1 and max(pieces[runs[0][0]]) >= length:
            continue  # the start of a piece that is long enough
        *joined, (last, part) = runs
        assert all(pieces[letter][-1] == count for letter, count in joined)  # whole short documents
        assert part <= pieces[last][-1] < length


def test_each_document_gives_one_sequence_unless_it_is_long(tmp_path: Path) -> None:
    limit = 4 * PIECE_CHARACTERS_PER_TOKEN
    path = write_documents(tmp_path / "documents.txt", ["a" * limit, "b" * (2 * limit), "c" * (limit + 3)])
    assert sorted(texts(load(path))) == ["aaaa", "bbbb", "bbbb", "cccc"]


def test_short_documents_are_joined(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "short.txt", ["ab"] * 5)
    assert texts(load(path)) == ["abab", "abab"]  # the fifth fills no sequence, and nothing is padded


def test_a_token_before_every_text_begins_each_sequence(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, begin)]
    )
    path = write_documents(tmp_path / "documents.txt", ["abcdef", "gh", "ij", "kl"])
    corpus = load(path, tokenizer=tokenizer)
    assert corpus.tokens[:, 0].tolist() == [begin] * len(corpus.tokens)
    assert (corpus.tokens[:, 1:] != begin).all()
    assert len(corpus.tokens) == 2


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


# What cannot be used


def test_too_little_text(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "little.txt", ["abc", "de"])
    message = (
        r"little\.txt: 5 tokens of text, but one sequence takes 6 \(prompt and continuation\)\. "
        r"Give a larger dataset, or lower --prompt-tokens or --continuation-tokens\.$"
    )
    with pytest.raises(TdaError, match=message):
        load(path, length=6)
    assert len(load(path, length=5).tokens) == 1


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_missing_file(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"nowhere\{suffix}: no such file\.$"):
        load(tmp_path / f"nowhere{suffix}")


@pytest.mark.parametrize(
    ("name", "content"),
    [("empty.txt", ""), ("blank.txt", " \n\n"), ("newline.jsonl", "\n"), ("header.csv", "text,b\n")],
)
def test_dataset_without_rows(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(TdaError, match=rf"{name}: the dataset is empty\. Give one that holds text\.$"):
        load(tmp_path / name)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".parquet"])
def test_file_of_no_bytes(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"none{suffix}").write_bytes(b"")
    with pytest.raises(TdaError, match=rf"none\{suffix}: the dataset (is empty|cannot be read)"):
        load(tmp_path / f"none{suffix}")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("latin1.txt", b"caf\xe9 au lait"),
        ("damaged.jsonl", b"{nope"),
        ("damaged-later.jsonl", b'{"text": "aaaa"}\n{"te'),
        ("damaged.csv", b'text,b\n"aaaa,1\n'),
        ("damaged.parquet", b"PAR1 and then nothing of use PAR1"),
    ],
)
def test_damaged_file(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TdaError, match=rf"{name}: the dataset cannot be read \(.+\)\.$"):
        load(tmp_path / name)


def test_column_of_numbers(tmp_path: Path) -> None:
    (tmp_path / "numbers.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(UsageError, match=r"numbers\.jsonl: column 'text' holds no text\. Choose another with"):
        load(tmp_path / "numbers.jsonl")


def test_text_files_have_no_columns(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "documents.txt", ["abcd"])
    assert texts(load(path, text_column="text")) == ["abcd"]
    for dataset in (path, BUILTIN):
        with pytest.raises(UsageError, match=r"a text file has no columns\. Leave --text-column out\.$"):
            load(dataset, text_column="body")


@pytest.mark.parametrize("name", ["notes.md", "folder"])
def test_unknown_kind_of_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.mkdir() if name == "folder" else path.write_text("abcd")
    with pytest.raises(UsageError, match=rf"{name}: not a \.txt, \.jsonl, \.csv or \.parquet file\.$"):
        load(path)


# The hub


def test_unknown_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = (
        r"^no-such/dataset: no such file, and no such dataset on the hub \([^\n]+\)\. "
        r"Give 'builtin', a \.txt, \.jsonl, \.csv or \.parquet file, or a hub dataset \(name or name:config:split\)\.$"
    )
    with pytest.raises(UsageError, match=message):
        load("no-such/dataset")


@pytest.mark.parametrize(("error", "reason"), [("first\nsecond", "first"), ("", "ValueError"), ("x" * 999, "x" * 200)])
def test_hub_errors_are_one_short_line(error: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ValueError(error)

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(UsageError, match=rf"\({reason}\)\. Give 'builtin'") as caught:
        load("org/name")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("org/name", ("org/name", None, "train")),
        ("org/name:small", ("org/name", "small", "train")),
        ("org/name:small:test", ("org/name", "small", "test")),
        ("org/name::test", ("org/name", None, "test")),
    ],
)
def test_hub_dataset_is_streamed(
    dataset: str, expected: tuple[str, str | None, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset

    asked: list[tuple[str, str | None, str]] = []

    def serve(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        assert streaming
        asked.append((name, config, split))
        return Dataset.from_dict({"text": ["abcdef"]}).to_iterable_dataset()

    monkeypatch.setattr("datasets.load_dataset", serve)
    assert texts(load(dataset)) == ["abcd"]
    assert asked == [expected]
