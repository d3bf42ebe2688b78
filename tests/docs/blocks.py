"""The fenced blocks of README.md and docs/*.md, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]*)`")


@dataclass(frozen=True)
class Block:
    """A fenced block. `language` is the first word after the fence; `norun`: why its commands do not run here."""

    language: str
    norun: str
    body: str

    @property
    def commands(self) -> list[str]:
        """Return the lines of a block of shell commands, with continued lines joined."""
        lines = self.body.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def blocks(document: str) -> list[Block]:
    """Return the fenced blocks of a document, in order."""
    found = []
    for match in FENCE.finditer((ROOT / document).read_text(encoding="utf-8")):
        language, _, norun = match["info"].strip().partition(" norun=")
        found.append(Block(language, norun, match["body"]))
    return found


def written_commands(document: str) -> Iterator[list[str]]:
    """Yield the words after `tda-export` of every command, in fenced blocks and inline."""
    text = (ROOT / document).read_text(encoding="utf-8")
    lines = [line for block in blocks(document) if block.language == "sh" for line in block.commands]
    for line in [*lines, *INLINE.findall(FENCE.sub("", text))]:
        for start in re.finditer(r"(?:^|[\s|])(?:tda-export|-m tda_export)\s+(?=[a-z])", line):
            yield shlex.split(line[start.end() :], comments=True)
