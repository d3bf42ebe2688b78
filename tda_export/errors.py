"""The errors that a user sees: one line that says what is wrong, where, and the way out."""


class TdaError(Exception):
    """A failure that the user can act on. The command line prints its text and exits with 1."""


class UsageError(TdaError):
    """The request itself is wrong (a bad option, an option that does not fit). The command line exits with 2."""
