"""SIGINT and SIGTERM end the process at once, whatever it is doing, and undo unfinished work.

An exception from the handler would be swallowed where Python swallows exceptions (destructors, callbacks from C) and
would end half an import as a traceback. So the handler ends the process itself. Cleanup that `finally` would have done
is registered with `undo_on_signal`.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

UNDO_SECONDS = 10.0  # afterwards the process ends with leftovers, which the next run removes

_at_terminate: list[Callable[[], str]] = []
_undo: dict[object, tuple[int, Callable[[], None]]] = {}  # with the process that registered it, since forks have copies


@contextlib.contextmanager
def undo_on_signal(undo: Callable[[], None]) -> Iterator[None]:
    """While the block runs, have `undo` called if a signal ends the process. `undo` may find its work half done."""
    key = object()
    _undo[key] = (os.getpid(), undo)
    try:
        yield
    finally:
        del _undo[key]


def say_at_terminate(line: Callable[[], str]) -> None:
    """Have the process print this line on standard error when SIGTERM ends it; an empty line is not printed."""
    _at_terminate[:] = [line]


def end_on_signals() -> None:
    """Let SIGINT, unless it is ignored, and SIGTERM end this process with exit code 128 + signal."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell ignores it for background jobs
        signal.signal(signal.SIGINT, _end)
    signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: FrameType | None) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):  # a second signal has nothing more to do
        signal.signal(each, signal.SIG_IGN)
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, UNDO_SECONDS)
    for process, undo in reversed(list(_undo.values())):
        if process == os.getpid():
            with contextlib.suppress(Exception):
                undo()
    with contextlib.suppress(Exception):
        if line := _last_line(number):
            os.write(2, f"{line}\n".encode())
    os._exit(128 + number)


def _last_line(number: int) -> str:
    if number == signal.SIGINT:  # a terminal sends it to all ranks; only one reports it
        return "Interrupted." if os.environ.get("RANK", "0") == "0" else ""
    return _at_terminate[0]() if _at_terminate else ""
