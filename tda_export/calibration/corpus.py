"""Draw token sequences of one length from a dataset."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tda_export.errors import TdaError, UsageError, first_line

BUILTIN = "builtin"
DOCUMENT_SEPARATOR = "\n<|document|>\n"  # a line of its own in a text file
FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
PIECE_CHARACTERS_PER_TOKEN = 8  # about twice the length of an English token
SHUFFLE_BUFFER = 1_000  # pieces
EMPTY = "{}: the dataset is empty. Give one that contains text."


@dataclass(frozen=True)
class Corpus:
    """Token sequences int64 [N, P + C], and what identifies the text that they came from.

    `prefix_tokens`: the number of tokens that the tokenizer puts before a text (BOS); each sequence begins with them.
    """

    tokens: torch.Tensor
    name: str
    sha256: str
    prefix_tokens: int = 0

    def describe(self) -> dict[str, Any]:
        """Return the provenance for the calibration file."""
        return {"name": self.name, "sequences": self.tokens.shape[0], "tokens_sha256": self.sha256}


def builtin_folder() -> Path:
    """Return the folder of the built-in calibration text, in an installed package or in a source tree."""
    package = Path(__file__).parents[1]
    for folder in (package / "calibration_data", package.parent / "calibration_data"):
        if (folder / "SHA256SUMS").is_file():
            return folder
    raise TdaError("The built-in calibration text is missing from this installation. Reinstall tda-export.")


def load_corpus(
    dataset: str,
    tokenizer: Any,
    *,
    text_column: str | None,
    sequences: int,
    length: int,
    seed: int,
    vocab_size: int,
) -> Corpus:
    """Draw token sequences from a dataset.

    Documents are cut into pieces that hold about two sequences, and the pieces are shuffled by `seed`. Each piece gives
    its first sequence. If the dataset ends before there are enough, the rests of long pieces and the short pieces are
    joined, with a blank line between them, into more sequences. No sequence is padded.

    Args:
        dataset: `builtin`, a .txt, .jsonl, .csv or .parquet file, or a hub dataset `name` or `name:config:split`.
        tokenizer: A transformers tokenizer; a token that it puts before a text (BOS) begins each sequence.
        text_column: The column that holds the text; None takes `text`.
        sequences: N, how many to draw; fewer are returned when the dataset has no more.
        length: The number of tokens of each sequence.
        seed: The seed of the documents' order.
        vocab_size: V of the model, which may have fewer tokens than its tokenizer.

    Raises:
        UsageError: The file, the dataset or the column does not exist, or the text holds a token that the model does
            not have.
        TdaError: The dataset holds less text than one sequence.
    """
    prefix = list(tokenizer("").input_ids)
    blank_line = tokenizer("\n\n", add_special_tokens=False).input_ids
    size = length - len(prefix)
    windows: list[list[int]] = []
    spare: list[list[int]] = []
    spared = 0
    pieces = _documents(dataset, text_column, seed, length * PIECE_CHARACTERS_PER_TOKEN)
    for number, text in enumerate(pieces):
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        if len(tokens) >= size:
            windows.append(tokens[:size])
            tokens = tokens[size:]
        if tokens:
            spare.append(tokens)
            spared += len(tokens)
        # Do not read a large dataset of short pieces to its end.
        if len(windows) == sequences or (number > SHUFFLE_BUFFER and len(windows) + spared // size >= sequences):
            break
    seen = size * len(windows) + spared
    joined: list[int] = []
    for tokens in spare:
        if len(windows) == sequences:
            break
        joined += [*blank_line, *tokens] if joined else tokens
        while len(joined) >= size and len(windows) < sequences:
            windows.append(joined[:size])
            joined = joined[size:]
    if not windows:
        raise TdaError(
            f"{dataset}: {seen} tokens of text, but one sequence takes {length} (prompt and continuation). "
            "Give a larger dataset, or lower --prompt-tokens or --continuation-tokens."
        )
    stacked = torch.tensor([prefix + window for window in windows], dtype=torch.int64)  # [N, P + C]
    beyond = stacked[stacked >= vocab_size]
    if len(beyond):
        token = int(beyond[0])
        raise UsageError(
            f"{dataset}: the text contains {str(tokenizer.convert_ids_to_tokens(token))[:100]!r}, token {token} of the "
            f"tokenizer, and the model's vocabulary ends at {vocab_size - 1}. Remove it from the text."
        )
    return Corpus(stacked, dataset, hashlib.sha256(stacked.numpy().tobytes()).hexdigest(), len(prefix))


def _documents(dataset: str, text_column: str | None, seed: int, characters: int) -> Iterator[str]:
    """Yield pieces of at most `characters`, shuffled."""
    from datasets import IterableDataset, disable_progress_bars

    disable_progress_bars()
    try:
        rows, column, separated = _open(dataset, text_column)
        first: dict[str, Any] = next(iter(rows), {})
        if first and column not in first:
            raise UsageError(
                f"{dataset}: no column {column!r}; the columns are {', '.join(first)}. Choose one with --text-column."
            )
        if first and first[column] is not None and not isinstance(first[column], str):
            raise UsageError(f"{dataset}: column {column!r} contains no text. Choose another with --text-column.")
        arguments = {"rows": rows, "column": column, "separated": separated, "characters": characters}
        pieces = IterableDataset.from_generator(_pieces, gen_kwargs=arguments)
        empty = True
        for piece in pieces.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER):
            empty = False
            yield piece["text"]
        if empty:
            raise TdaError(EMPTY.format(dataset))
    except TdaError:
        raise
    except Exception as error:  # readers of damaged files raise many kinds of errors
        raise TdaError(
            f"{dataset}: the dataset cannot be read ({first_line(error)}). Check that it is UTF-8 text and that every "
            f"row has the column {text_column or 'text'!r}."
        ) from error


def _open(dataset: str, text_column: str | None) -> tuple[Any, str, bool]:
    """Open a dataset as a stream of rows; return it, its text column, and whether it may hold separator lines."""
    from datasets import load_dataset

    path = Path(os.path.expanduser(dataset))
    suffix = path.suffix.lower()
    if dataset == BUILTIN or (suffix == ".txt" and path.is_file()):
        files = sorted(builtin_folder().glob("*.txt")) if dataset == BUILTIN else [path]
        if text_column not in (None, "text"):
            raise UsageError(f"{dataset}: a text file has no columns. Leave --text-column out.")
        names = [str(file) for file in files]
        return load_dataset("text", data_files=names, sample_by="document", split="train", streaming=True), "text", True
    column = text_column or "text"
    if suffix in FORMATS:
        if not path.is_file():
            raise UsageError(f"{dataset}: no such file.")
        if not path.stat().st_size:  # their readers raise errors of other kinds
            raise TdaError(EMPTY.format(dataset))
        return load_dataset(FORMATS[suffix], data_files=str(path), split="train", streaming=True), column, False
    if path.exists():
        raise UsageError(f"{dataset}: not a .txt, .jsonl, .csv or .parquet file.")
    name, _, rest = dataset.partition(":")
    config, _, split = rest.partition(":")
    try:
        return load_dataset(name, config or None, split=split or "train", streaming=True), column, False
    except Exception as error:  # the hub raises many kinds of errors
        raise UsageError(
            f"{dataset}: no such file, and no such dataset on the hub ({first_line(error)}). Give 'builtin', a .txt, "
            ".jsonl, .csv or .parquet file, or a hub dataset (name or name:config:split)."
        ) from error


def _pieces(rows: Any, column: str, separated: bool, characters: int) -> Iterator[dict[str, str]]:
    separator = f"^{re.escape(DOCUMENT_SEPARATOR.strip())}$"
    for row in rows:
        text = row[column]
        if not isinstance(text, str):
            continue
        for document in re.split(separator, text, flags=re.MULTILINE) if separated else [text]:
            document = document.strip("\n")
            for start in range(0, len(document), characters):
                if piece := document[start : start + characters].strip():
                    yield {"text": piece}
