"""The errors that a user sees: one line that says what is wrong, where, and the way out."""

from __future__ import annotations

NAME_LENGTH = 80  # characters shown of a name from a file
REASON_LENGTH = 300  # characters shown of another library's message
MESSAGE_LENGTH = 2000  # characters of a whole message at most


class TdaError(Exception):
    """A failure that the user can act on. The command line prints its text, always one line, and exits with 1."""

    def __init__(self, message: object = "") -> None:
        super().__init__(shown(message, MESSAGE_LENGTH))


class UsageError(TdaError):
    """The request itself is wrong (a bad option, an option that does not fit). The command line exits with 2."""


def shown(value: object, length: int = NAME_LENGTH) -> str:
    """Return text from a file in a form that is safe in a message: unprintable characters escaped, the middle cut out.

    Names from files may hold line ends, terminal controls, or a megabyte.

    Args:
        value: A name, a number, another library's message.
        length: The most characters of the result.
    """
    text = _text(value)
    if len(text) > 4 * length:  # text that will be cut out need not be escaped
        text = text[: 2 * length] + text[-2 * length :]
        cut = True
    else:
        cut = False
    text = "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )
    if not cut and len(text) <= length:
        return text
    kept = length - 1
    return f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message, or the error's type if it says nothing."""
    return shown((_text(error).strip().splitlines() or [type(error).__name__])[0], REASON_LENGTH)


def _text(value: object) -> str:
    try:
        return str(value)
    except ValueError:  # a number with more digits than Python converts to text
        return "a number of too many digits"
