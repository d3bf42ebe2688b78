"""Prompt lookup: what followed the newest tokens earlier in the text is a draft that one step checks.

Source: Saxena, Prompt Lookup Decoding (2023); Yang et al., Inference with Reference (arXiv 2304.04487).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from tda_export.errors import UsageError

MOST_DRAFTS = 15  # tokens; a step reads one more
LONGEST_MATCH, SHORTEST_MATCH = 4, 2  # tokens that a draft's place has in common with the end of the text
FIRST_LENGTH = 2  # tokens of a first draft, where every token costs time

Following = TypeVar("Following")


def check_lookup(tokens: int) -> None:
    """Check how many tokens a draft may have.

    Raises:
        UsageError: It is not in [0, 15].
    """
    if not 0 <= tokens <= MOST_DRAFTS:
        raise UsageError(f"A lookup of {tokens} tokens is outside [0, {MOST_DRAFTS}]. Give 0 for none.")


class TextIndex:
    """A text of tokens that grows, with the newest place of each n-gram that something follows.

    A draft goes on from the newest place before the end that has the longest match with the end of the text, of
    `SHORTEST_MATCH` to `LONGEST_MATCH` tokens. Where it reaches the end of the text it goes on with its own tokens, so
    that a text which repeats itself is drafted to any length.
    """

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self._tokens: list[int] = []
        self._following: dict[tuple[int, ...], int] = {}  # by n-gram the place after it
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """Append a token."""
        place = len(self._tokens)
        for length in range(SHORTEST_MATCH, min(LONGEST_MATCH, place) + 1):
            self._following[tuple(self._tokens[place - length :])] = place
        self._tokens.append(token)

    def draft(self, most: int) -> list[int]:
        """Return up to `most` tokens that may come next, none where no n-gram of the end occurred before."""
        end = len(self._tokens)
        for length in range(min(LONGEST_MATCH, end), SHORTEST_MATCH - 1, -1):
            place = self._following.get(tuple(self._tokens[end - length :]))
            if place is not None:
                period = end - place
                return [self._tokens[place + i % period] for i in range(most)]
        return []


class Lookahead(Generic[Following]):
    """What one step has read, tokens of which the first is certain, and what it says follows each of them.

    A token is confirmed when what followed the one before it was chosen and is that token; the rest is worth nothing as
    soon as another was chosen.
    """

    def __init__(self, tokens: Sequence[int] = (), following: Sequence[Following] = ()) -> None:
        """Begin with the first token.

        Args:
            tokens: Those that were given to the step.
            following: For as many of them as it has read.
        """
        self._tokens, self._all, self._place = tokens, following, 0

    @property
    def drafted(self) -> int:
        """How many of the tokens that were read were not certain."""
        return max(len(self._all) - 1, 0)

    @property
    def accepted(self) -> int:
        """How many of these turned out right."""
        return self._place

    @property
    def following(self) -> Following:
        """What follows the newest certain token."""
        return self._all[self._place]

    def confirm(self, token: int) -> bool:
        """Go on to the next token if it was read and is `token`, the one that was chosen; say whether."""
        following = self._place + 1
        if following >= len(self._all) or self._tokens[following] != token:
            return False
        self._place = following
        return True


def next_length(length: int, last: Lookahead[Following], most: int) -> int:
    """Return how many tokens the next draft may have: twice as many as the last one if that was right throughout,
    otherwise as many as were right of it, and one at least.

    Args:
        length: What the last one might have had.
        last: What came of it.
        most: That any may have.
    """
    if not last.drafted:
        return min(length, most)
    return min(2 * length, most) if last.accepted == last.drafted else max(last.accepted, 1)
