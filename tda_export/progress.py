"""Progress of long steps: a bar on a terminal, plain lines otherwise. Always on standard error."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from tda_export.signals import undo_on_signal

if TYPE_CHECKING:
    from rich.console import Console

LINE_EVERY_SECONDS = 10.0
SHOW_CURSOR = b"\x1b[?25h\r\x1b[2K"  # show the cursor and clear the bar's line

Advance = Callable[[int], None]


@contextlib.contextmanager
def progress(description: str, total: int, *, quiet: bool = False) -> Iterator[Advance]:
    """Show progress of a step while the block runs.

    Args:
        description: What is being done, a few words.
        total: Units of the whole step.
        quiet: Show nothing.

    Yields:
        A function to call with the number of units done since the last call.
    """
    if quiet:
        yield lambda units: None
        return
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )

        def restore() -> None:
            if not (console.legacy_windows or console.is_dumb_terminal):
                os.write(2, SHOW_CURSOR)

        with undo_on_signal(restore), Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(description, total=total)
            yield lambda units: bar.advance(task, units)
    else:
        yield _lines(console, description, total)


def _lines(console: Console, description: str, total: int) -> Advance:
    done, last = 0, time.monotonic()

    def advance(units: int) -> None:
        nonlocal done, last
        done += units
        now = time.monotonic()
        if now - last >= LINE_EVERY_SECONDS and done < total:
            last = now
            console.print(f"{description}: {done / total:.0%}", highlight=False)

    return advance
