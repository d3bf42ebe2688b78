"""Prompt lookup: the tokens that followed the newest ones earlier in the text are a draft, which one step checks.

Source: Saxena, Prompt Lookup Decoding (2023); Yang et al., Inference with Reference (arXiv 2304.04487).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from tda_export.errors import UsageError

MOST_DRAFTS = 15  # tokens; a step reads one more
LONGEST_MATCH, SHORTEST_MATCH = 4, 2  # tokens that must match between a draft's place and the end of the text
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
    """A growing text of tokens, with the newest place of each n-gram that is followed by a token.

    A draft starts at the place with the longest match with the end of the text, of `SHORTEST_MATCH` to `LONGEST_MATCH`
    tokens; the newest such place counts. Where a draft reaches the end of the text it continues with its own tokens, so
    that a text that repeats itself can be drafted to any length.
    """

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self._tokens: list[int] = []
        self._following: dict[tuple[int, ...], int] = {}  # the place after each n-gram
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """Append a token."""
        place = len(self._tokens)
        for length in range(SHORTEST_MATCH, min(LONGEST_MATCH, place) + 1):
            self._following[tuple(self._tokens[place - length :])] = place
        self._tokens.append(token)

    def draft(self, most: int) -> list[int]:
        """Return up to `most` tokens that may come next; none where no n-gram at the end occurred before."""
        end = len(self._tokens)
        for length in range(min(LONGEST_MATCH, end), SHORTEST_MATCH - 1, -1):
            place = self._following.get(tuple(self._tokens[end - length :]))
            if place is not None:
                period = end - place
                return [self._tokens[place + i % period] for i in range(most)]
        return []


class Lookahead(Generic[Following]):
    """The tokens that one step has read, and what follows each of them. Only the first token is known to be in the
    text; the others are drafts.

    A draft is confirmed when it is the token that was chosen to follow the one before it. As soon as another token is
    chosen, the remaining drafts are discarded.
    """

    def __init__(self, tokens: Sequence[int] = (), following: Sequence[Following] = ()) -> None:
        """Begin with the first token.

        Args:
            tokens: The tokens that were given to the step.
            following: What follows each token that the step has read, which may be fewer than were given.
        """
        self._tokens, self._all, self._place = tokens, following, 0

    @property
    def drafted(self) -> int:
        """The number of drafts that were read."""
        return max(len(self._all) - 1, 0)

    @property
    def accepted(self) -> int:
        """The number of drafts that were confirmed."""
        return self._place

    @property
    def following(self) -> Following:
        """What follows the newest confirmed token."""
        return self._all[self._place]

    def confirm(self, token: int) -> bool:
        """Advance to the next draft if it was read and equals `token`, the one that was chosen; return whether it
        does."""
        following = self._place + 1
        if following >= len(self._all) or self._tokens[following] != token:
            return False
        self._place = following
        return True


def next_length(length: int, last: Lookahead[Following], most: int) -> int:
    """Return how many tokens the next draft may have: twice as many as the last draft if all of it was confirmed,
    otherwise as many as were confirmed, at least one.

    Args:
        length: The most tokens that the last draft could have.
        last: The result of the last draft.
        most: The most tokens of any draft.
    """
    if not last.drafted:
        return min(length, most)
    return min(2 * length, most) if last.accepted == last.drafted else max(last.accepted, 1)
