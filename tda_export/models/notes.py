"""Show transformers' warnings while it loads a model as notes of one line, except those that do not concern the
user."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from typing import TextIO

LONGEST_NOTE = 400  # characters

# Parts of transformers whose warnings are irrelevant here, by prefix of the logger's name. All other warnings are
# passed on: they concern the configuration, the tokenizer or the weights.
SILENT = (
    "transformers.generation",  # transformers' own generation, unused here
    "transformers.quantizers.",  # packed weights, which are de-quantised here
    "transformers.integrations.",  # the same, and attention kernels
    "transformers.models.auto.",  # the choice of its classes
)
SILENT_FUNCTIONS = (
    "log_state_dict_report",  # mismatched tensors are errors here, others are ignored
    "_eventual_warn_about_too_long_sequence",  # calibration text is cut after tokenization
)


def quiet_transformers() -> None:
    """Disable transformers' progress bars, and show its relevant warnings once each, as one line."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_warning()
    transformers_logging.disable_progress_bar()
    transformers_logging.disable_default_handler()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it only reports the requested placement of weights
    logger = logging.getLogger("transformers")
    if _NOTES not in logger.handlers:
        logger.addHandler(_NOTES)


def say(note: str) -> None:
    """Show a note as one line on standard error, each note only once."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(note.split()))
    if line not in _NOTES.said:
        _NOTES.said.add(line)
        print(f"Note: {line[:LONGEST_NOTE]}", file=_NOTES.stream or sys.stderr, flush=True)


@contextlib.contextmanager
def nothing_but_notes() -> Iterator[None]:
    """Suppress standard error except for notes, since some progress bars cannot be disabled."""
    _NOTES.stream = sys.stderr
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        _NOTES.stream = None


class _Notes(logging.Handler):
    """Turns warnings of transformers into notes."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: set[str] = set()
        self.stream: TextIO | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.name.startswith(SILENT) and record.funcName not in SILENT_FUNCTIONS

    def emit(self, record: logging.LogRecord) -> None:
        say(f"transformers says: {record.getMessage()}")


_NOTES = _Notes()
