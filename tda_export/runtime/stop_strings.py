"""End a generation at given strings, whether or not they end at token boundaries."""

from __future__ import annotations

from collections.abc import Sequence

from tda_export.errors import UsageError


class StopStrings:
    """Passes streamed text on up to the first stop string, and never passes on part of one.

    Text that may be the beginning of a stop string is held back until more text decides. The result does not depend on
    how the text was cut into pieces: the stop string that is complete first counts, and the longest of those that are
    complete at the same character.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise UsageError("A stop string is empty. Give one character or more.")
        self._stops = sorted(stops, key=len, reverse=True)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Return the text that is sure not to belong to a stop string, and whether one was found.

        Nothing may be added after one was found.
        """
        start = len(self._held)
        self._held += text
        for end in range(start + 1, len(self._held) + 1):
            for stop in self._stops:
                if self._held.endswith(stop, 0, end):
                    return self._held[: end - len(stop)], True
        return self._release(self._possible_stop()), False

    def finish(self) -> str:
        """Return what was held back: no more text comes."""
        return self._release(len(self._held))

    def _possible_stop(self) -> int:
        """Return where in the held text a stop string may have begun, or its end where none has."""
        longest = max(map(len, self._stops), default=1) - 1
        for start in range(max(0, len(self._held) - longest), len(self._held)):
            if any(stop.startswith(self._held[start:]) for stop in self._stops):
                return start
        return len(self._held)

    def _release(self, end: int) -> str:
        text, self._held = self._held[:end], self._held[end:]
        return text
