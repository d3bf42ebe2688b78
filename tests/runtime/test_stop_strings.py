"""Stop strings, against a slow reference that reads the text character by character."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tda_export.errors import UsageError
from tda_export.runtime.stop_strings import StopStrings

SHORT = st.text("ab\n", min_size=1, max_size=4)  # few letters, so that beginnings of stop strings are frequent


def slow_cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """Return the text before the stop string that is complete first, and whether there is one."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


def run(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    """Return the output, piece by piece and at the end."""
    watcher, out = StopStrings(stops), list[str]()
    for piece in pieces:
        text, stopped = watcher.add(piece)
        out.append(text)
        if stopped:
            return out, True
    return [*out, watcher.finish()], False


@given(st.lists(st.text("ab\n", max_size=5), max_size=8), st.lists(SHORT, max_size=3))
@example(["a", "ab"], ["aab"])
@example(["abab"], ["bab", "ab"])
@example(["ab"], ["b", "ab"])
def test_any_cut_into_pieces(pieces: list[str], stops: list[str]) -> None:
    out, stopped = run(pieces, stops)
    assert ("".join(out), stopped) == slow_cut("".join(pieces), stops)


@given(st.text("ab\n", max_size=12), st.lists(SHORT, min_size=1, max_size=3))
def test_nothing_is_held_back_without_need(text: str, stops: list[str]) -> None:
    """After every character, exactly the possible beginning of a stop string is held back."""
    watcher, out = StopStrings(stops), ""
    for end, character in enumerate(text, start=1):
        piece, stopped = watcher.add(character)
        out += piece
        if stopped:
            return
        held = text[len(out) : end]
        assert out + held == text[:end]
        beginnings = {stop[:length] for stop in stops for length in range(len(stop))}
        assert held == max((begin for begin in beginnings if text[:end].endswith(begin)), key=len)


def test_without_stop_strings_all_passes() -> None:
    assert run(["a", "", "bc"], []) == (["a", "", "bc", ""], False)


def test_a_string_across_tokens_is_never_shown() -> None:
    assert run(["one ", "#", "#", "x ##", "# two"], ["###"]) == (["one ", "", "", "##x ", ""], True)
    assert run(["one ", "#", "#"], ["###"]) == (["one ", "", "", "##"], False)


@pytest.mark.parametrize("stops", [[""], ["a", ""]])
def test_an_empty_stop_string(stops: list[str]) -> None:
    with pytest.raises(UsageError, match=r"^A stop string is empty\. Give one character or more\.$"):
        StopStrings(stops)
