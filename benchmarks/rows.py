"""What the scripts print and keep: rows of JSON."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tda_export.errors import TdaError, UsageError
from tda_export.graph.contract import MANIFEST_FILE
from tda_export.runtime.artifact import Artifact

Row = dict[str, Any]


def print_rows(rows: Iterable[Row], line: Callable[[Row], str] = json.dumps, header: str = "") -> int:
    """Print rows as they come. Returns the exit status: 2 for bad usage and 1 for a failure, each with one line."""
    try:
        if header:
            print(header)
        for row in rows:
            print(line(row), flush=True)
    except TdaError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def file_id(path: Path) -> str:
    """Tell one content of a file from another.

    Raises:
        UsageError: It cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}. Give another file.") from error


def artifact_id(artifact: Artifact) -> str:
    """Tell one build of an artifact from another."""
    return file_id(artifact.folder / MANIFEST_FILE)


class Rows:
    """Rows by what identifies them; kept in a file of one JSON object a line, where one is given."""

    def __init__(self, path: Path | None, names: tuple[str, ...]) -> None:
        """Read what the file has. `names`: the keys that identify a row; rows without one of them are of other runs.

        A last line that was cut off while it was written is deleted.

        Raises:
            TdaError: Another line is no JSON object.
        """
        self.path, self.names = path, names
        self.found: dict[tuple[Any, ...], Row] = {}
        if path is None or not path.exists():
            return
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole, encoding="utf-8")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                row.get(None)
            except (ValueError, AttributeError) as error:
                raise TdaError(f"{path}, line {number}: not a row. Give another file with --rows.") from error
            if all(name in row for name in names):
                self.found[self.key(row)] = row

    def key(self, row: Row) -> tuple[Any, ...]:
        """What identifies a row."""
        return tuple(row[name] for name in self.names)

    def get(self, row: Row) -> Row | None:
        """Return the row that was kept of what these keys identify."""
        return self.found.get(self.key(row))

    def add(self, row: Row) -> Row:
        """Keep a row, and return it."""
        self.found[self.key(row)] = row
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return row
