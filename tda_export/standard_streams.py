"""Standard input, output and error that the parent process closed, or that cannot be written."""

from __future__ import annotations

import os
import sys


def open_standard_streams() -> None:
    """Open the null device for each standard stream that is closed.

    Otherwise the next file that is opened, such as an artifact's weights, takes the stream's descriptor, and what
    libraries print is written into that file. Python represents a closed stream as None, which few callers expect.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - for good


def drop_unwritable() -> None:
    """Drop what output and error hold and cannot write. As it ends, the interpreter would fail to write it, say so in
    several lines, and exit with 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
