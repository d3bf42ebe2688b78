"""Datasets that cannot be used, and datasets of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tda_export.calibration.corpus import (
    BUILTIN,
)
from tda_export.errors import TdaError, UsageError
from tests.calibration.test_corpus import MARKER, load, texts, write_documents, write_format


def test_too_little_text(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "little.txt", ["abc", "de"])
    message = (
        r"little\.txt: 5 tokens of text, but one sequence takes 8 \(prompt and continuation\)\. "
        r"Give a larger dataset, or lower --prompt-tokens or --continuation-tokens\.$"
    )
    with pytest.raises(TdaError, match=message):
        load(path, length=8)
    assert sorted(texts(load(path, length=7))[0]) == sorted("abc\n\nde")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_missing_file(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"nowhere\{suffix}: no such file\.$"):
        load(tmp_path / f"nowhere{suffix}")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.txt", ""),
        ("blank.txt", " \n\n"),
        ("markers.txt", f"{MARKER}\n \n{MARKER}\n"),
        ("nothing.jsonl", ""),
        ("nothing.csv", ""),
        ("newline.jsonl", "\n"),
        ("null.jsonl", '{"text": null}\n'),
        ("blank.jsonl", '{"text": " "}\n{"text": null}\n{"text": ""}\n'),
        ("header.csv", "text,b\n"),
        ("blank.csv", 'text,b\n" ",1\n'),
    ],
)
def test_dataset_without_text(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(TdaError, match=rf"{name}: the dataset is empty\. Give one that contains text\.$"):
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
    with pytest.raises(TdaError, match=rf"{name}: the dataset cannot be read \(.+\)\. Check that it is UTF-8"):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("numbers.jsonl", '{"text": 3}\n'),
        ("lists.jsonl", '{"text": ["a", "b"]}\n'),
        ("objects.jsonl", '{"text": {"a": "b"}}\n'),
        ("numbers.csv", "text,b\n3,a\n"),
    ],
)
def test_column_that_holds_no_text(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    message = rf"{name}: column 'text' contains no text\. Choose another with --text-column\.$"
    with pytest.raises(UsageError, match=message):
        load(tmp_path / name)


def test_parquet_column_of_numbers_is_refused_and_another_is_taken(tmp_path: Path) -> None:
    path = write_format(tmp_path, ".parquet", "text", ["abcd"])
    with pytest.raises(UsageError, match=r"data\.parquet: column 'number' contains no text\. Choose another with"):
        load(path, text_column="number")
    assert texts(load(path)) == ["abcd"]


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


@pytest.mark.parametrize(
    ("error", "reason"), [("first\nsecond", "first"), ("", "ValueError"), ("x" * 999, r"x{50,300}\S*")]
)
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
