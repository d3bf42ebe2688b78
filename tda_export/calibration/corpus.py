"""From a dataset to token sequences of one length."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tda_export.errors import TdaError, UsageError

BUILTIN = "builtin"
DOCUMENT_SEPARATOR = "\n<|document|>\n"  # a line of its own in a text file
FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
PIECE_CHARACTERS_PER_TOKEN = 8  # long documents are cut into pieces that surely hold one sequence
SHUFFLE_BUFFER = 10_000


@dataclass(frozen=True)
class Corpus:
    """Token sequences int64 [N, P + C], and what identifies the text that they came from."""

    tokens: torch.Tensor
    name: str
    sha256: str

    def describe(self) -> dict[str, Any]:
        """Provenance for the calibration file."""
        return {"name": self.name, "sequences": self.tokens.shape[0], "tokens_sha256": self.sha256}


def builtin_folder() -> Path:
    """Return the folder of the built-in calibration text, in an installed package or in a source tree."""
    package = Path(__file__).parents[1]
    for folder in (package / "calibration_data", package.parent / "calibration_data"):
        if (folder / "SHA256SUMS").is_file():
            return folder
    raise TdaError("The built-in calibration text is missing from this installation. Reinstall tda-export.")


def load_corpus(
    dataset: str, tokenizer: Any, *, text_column: str | None, sequences: int, length: int, seed: int
) -> Corpus:
    """Draw token sequences from a dataset.

    Every document gives at most one sequence, from its start; long documents (over 8 characters for each token of a
    sequence) are first cut into pieces, and short ones are joined until they fill a sequence. No sequence is padded.
    The order is shuffled by `seed`.

    Args:
        dataset: `builtin`, a .txt, .jsonl, .csv or .parquet file, or a hub dataset `name` or `name:config:split`.
        tokenizer: A transformers tokenizer; a token that it puts before a text (BOS) begins each sequence.
        text_column: The column that holds the text; None takes `text`.
        sequences: N, how many to draw; fewer are returned when the dataset has no more.
        length: Tokens of each sequence.
        seed: Order of the documents.

    Raises:
        UsageError: The file, the dataset or the column does not exist.
        TdaError: The dataset holds less text than one sequence.
    """
    prefix = list(tokenizer("").input_ids)
    windows: list[list[int]] = []
    joined: list[int] = []
    seen = 0
    for text in _pieces(_documents(dataset, text_column, seed), length * PIECE_CHARACTERS_PER_TOKEN):
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        seen += len(tokens)
        if len(prefix) + len(tokens) < length:
            joined += tokens
            tokens, joined = (joined, []) if len(prefix) + len(joined) >= length else ([], joined)
        if tokens:
            windows.append((prefix + tokens)[:length])
        if len(windows) == sequences:
            break
    if not windows:
        raise TdaError(
            f"{dataset}: {seen} tokens of text, but one sequence takes {length} (prompt and continuation). "
            "Give a larger dataset, or lower --prompt-tokens or --continuation-tokens."
        )
    stacked = torch.tensor(windows, dtype=torch.int64)  # [N, P + C]
    return Corpus(stacked, dataset, hashlib.sha256(stacked.numpy().tobytes()).hexdigest())


def _pieces(documents: Iterator[str], characters: int) -> Iterator[str]:
    for document in documents:
        for start in range(0, len(document), characters):
            yield document[start : start + characters]


def _documents(dataset: str, text_column: str | None, seed: int) -> Iterator[str]:
    from datasets import disable_progress_bars

    disable_progress_bars()
    try:
        rows, column = _open(dataset, text_column)
        first = next(iter(rows), None)
        if first is None:
            raise TdaError(f"{dataset}: the dataset is empty. Give one that holds text.")
        if column not in first:
            raise UsageError(
                f"{dataset}: no column {column!r}; the columns are {', '.join(first)}. Choose one with --text-column."
            )
        if first[column] is not None and not isinstance(first[column], str):
            raise UsageError(f"{dataset}: column {column!r} holds no text. Choose another with --text-column.")
        for row in rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER):
            if isinstance(row[column], str) and row[column].strip():
                yield row[column]
    except TdaError:
        raise
    except Exception as error:  # whatever a reader of damaged files raises
        raise TdaError(f"{dataset}: the dataset cannot be read ({_first_line(error)}).") from error


def _open(dataset: str, text_column: str | None) -> tuple[Any, str]:
    """Open a dataset as a stream of rows; return it and the name of its text column."""
    from datasets import IterableDataset, load_dataset

    path = Path(dataset).expanduser()
    suffix = path.suffix.lower()
    if dataset == BUILTIN or (suffix == ".txt" and path.is_file()):
        files = sorted(builtin_folder().glob("*.txt")) if dataset == BUILTIN else [path]
        if text_column not in (None, "text"):
            raise UsageError(f"{dataset}: a text file has no columns. Leave --text-column out.")
        stream = load_dataset(
            "text", data_files=[str(file) for file in files], sample_by="document", split="train", streaming=True
        )
        # Documents are separated before they are shuffled.
        return IterableDataset.from_generator(_separated, gen_kwargs={"rows": stream}), "text"
    if suffix in FORMATS:
        if not path.is_file():
            raise UsageError(f"{dataset}: no such file.")
        return load_dataset(FORMATS[suffix], data_files=str(path), split="train", streaming=True), text_column or "text"
    if path.exists():
        raise UsageError(f"{dataset}: not a .txt, .jsonl, .csv or .parquet file.")
    name, _, rest = dataset.partition(":")
    config, _, split = rest.partition(":")
    try:
        return load_dataset(name, config or None, split=split or "train", streaming=True), text_column or "text"
    except Exception as error:  # the hub's many ways of saying no
        raise UsageError(
            f"{dataset}: no such file, and no such dataset on the hub ({_first_line(error)}). Give 'builtin', a .txt, "
            ".jsonl, .csv or .parquet file, or a hub dataset (name or name:config:split)."
        ) from error


def _separated(rows: Any) -> Iterator[dict[str, str]]:
    separator = f"^{re.escape(DOCUMENT_SEPARATOR.strip())}$"
    for row in rows:
        for document in re.split(separator, row["text"], flags=re.MULTILINE):
            if document.strip():
                yield {"text": document.strip("\n")}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
