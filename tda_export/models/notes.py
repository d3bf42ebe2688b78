"""What transformers says while it loads a model: shown as notes of one line, but for what cannot concern the user."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from typing import TextIO

LONGEST_NOTE = 400  # characters

# Parts of transformers whose warnings say nothing of a model here, by the beginning of the logger's name. Everything
# else is passed on: it is about what the configuration, the tokenizer or the weights say.
SILENT = (
    "transformers.generation",  # how transformers itself would generate
    "transformers.quantizers.",  # weights that stay packed; here they are de-quantised
    "transformers.integrations.",  # the same, and kernels of attention
    "transformers.models.auto.",  # which of its classes it takes
)
SILENT_FUNCTIONS = (
    "log_state_dict_report",  # tensors that do not fit are errors here, others are left alone
    "_eventual_warn_about_too_long_sequence",  # calibration text is cut after it was tokenized
)


def quiet_transformers() -> None:
    """Show no progress bars of transformers, and of its warnings those that matter, each once, as one line."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_warning()
    transformers_logging.disable_progress_bar()
    transformers_logging.disable_default_handler()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it says where weights are, as was asked for
    logger = logging.getLogger("transformers")
    if _NOTES not in logger.handlers:
        logger.addHandler(_NOTES)


def say(note: str) -> None:
    """Show a note, in one line, on standard error; the same one once."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(note.split()))
    if line not in _NOTES.said:
        _NOTES.said.add(line)
        print(f"Note: {line[:LONGEST_NOTE]}", file=_NOTES.stream or sys.stderr, flush=True)


@contextlib.contextmanager
def nothing_but_notes() -> Iterator[None]:
    """Keep from standard error what is written there, notes excepted: some progress bars have no switch."""
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
