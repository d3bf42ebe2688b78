"""The errors that a user sees: one line that says what is wrong, where, and the way out."""


class TdaError(Exception):
    """A failure that the user can act on. The command line prints its text and exits with 1."""


class UsageError(TdaError):
    """The request itself is wrong (a bad option, an option that does not fit). The command line exits with 2."""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message, or the error's type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
