"""Write docs/commands.md from the commands' own help: python docs/make_commands.py."""

from __future__ import annotations

from pathlib import Path

import click

from tda_export.cli.help_groups import WIDTH
from tda_export.cli.main import cli

PAGE = Path(__file__).parent / "commands.md"
HEAD = """# Commands

What `tda-export COMMAND --help` prints. `python docs/make_commands.py` writes this page, and a test compares it.

Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted, 143 terminated. An error is one line on standard
error. `TDA_EXPORT_THREADS` sets the CPU threads of a session (default: all cores), `TDA_EXPORT_NATIVE=0` turns the
native kernels off, `TDA_EXPORT_HUGE_PAGES=0` lets processes on the CPU share weights.bin in memory instead of copying
it to huge pages, which is faster.
"""


def page() -> str:
    """Return the page: one section for each command, in the order in which they were added."""
    with click.Context(cli, info_name="tda-export", terminal_width=WIDTH, **cli.context_settings) as context:
        sections = [("tda-export", cli.get_help(context))]
        for name, command in cli.commands.items():
            with click.Context(command, info_name=name, parent=context, terminal_width=WIDTH) as inner:
                sections.append((name, command.get_help(inner)))
    return HEAD + "".join(f"\n## {name}\n\n```text\n{text}\n```\n" for name, text in sections)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
