"""What the scripts print and keep: rows of JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tda_export.errors import TdaError, UsageError

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


class Rows:
    """Rows by what identifies them; kept in a file of one JSON object a line, where one is given."""

    def __init__(self, path: Path | None, names: tuple[str, ...]) -> None:
        """Read what the file has. `names`: the keys that identify a row."""
        self.path, self.names = path, names
        lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else []
        self.found = {self.key(row): row for row in map(json.loads, lines)}

    def key(self, row: Row) -> tuple[Any, ...]:
        """What identifies a row."""
        return tuple(row[name] for name in self.names)

    def add(self, row: Row) -> Row:
        """Keep a row, and return it."""
        self.found[self.key(row)] = row
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return row
