"""Rows of JSON, which the scripts print and keep."""

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
    """Print rows as they come. Return the exit status: 2 for wrong usage and 1 for a failure, with a line on either."""
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
    """Return an id of a file's content.

    Raises:
        UsageError: It cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}. Give another file.") from error


def artifact_id(artifact: Artifact) -> str:
    """Return an id of an artifact's build."""
    return file_id(artifact.folder / MANIFEST_FILE)


class Rows:
    """Rows by the keys that identify them. They are kept in a file, one JSON object a line, if one is given."""

    def __init__(self, path: Path | None, names: tuple[str, ...]) -> None:
        """Read the rows of the file. `names`: the keys that identify a row. Rows without one of them are ignored.

        An incomplete last line, of an interrupted run, is deleted.

        Raises:
            TdaError: Another line is not a JSON object.
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
        """Return the values that identify a row."""
        return tuple(row[name] for name in self.names)

    def get(self, row: Row) -> Row | None:
        """Return the kept row that these keys identify, if there is one."""
        return self.found.get(self.key(row))

    def add(self, row: Row) -> Row:
        """Keep a row, and return it."""
        self.found[self.key(row)] = row
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return row
