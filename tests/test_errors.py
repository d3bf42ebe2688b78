"""Values in a message are shown on one line, shortened, and without control characters."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tda_export.errors import MESSAGE_LENGTH, NAME_LENGTH, REASON_LENGTH, TdaError, UsageError, first_line, shown


@given(st.text(st.characters(exclude_categories=[])), st.integers(2, 200))
def test_shown_is_short_printable_and_one_line(text: str, length: int) -> None:
    result = shown(text, length)
    assert len(result) <= length
    assert result.isprintable()
    if text.isprintable() and len(text) <= length:
        assert result == text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("prefill.onnx", "prefill.onnx"),
        ("naïve “名前”", "naïve “名前”"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[31mred\x9b", r"\x1b[31mred\x9b"),
        ("\u202egnp.exe", r"\u202egnp.exe"),  # a terminal would show the rest backwards
        ("\ud800", r"\ud800"),  # cannot be encoded
        (10**50, "1" + "0" * 50),
    ],
)
def test_shown_escapes_what_no_terminal_should_get(value: object, expected: str) -> None:
    assert shown(value) == expected


def test_a_number_that_python_does_not_print() -> None:
    assert shown(10**5000) == "a number of too many digits"


def test_the_middle_is_cut_out() -> None:
    assert shown("begin" + "x" * 10**6 + "end", 11) == "begin…xxend"
    assert len(shown("x" * 10**6)) == NAME_LENGTH


def test_first_line_of_an_error() -> None:
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError("")) == "ValueError"
    assert first_line(ValueError("a\x1bb")) == r"a\x1bb"
    assert len(first_line(ValueError("x" * 10**6))) == REASON_LENGTH


@pytest.mark.parametrize("kind", [TdaError, UsageError])
def test_every_error_is_one_line_with_its_beginning_and_its_end(kind: type[TdaError]) -> None:
    assert str(kind("file: two\nlines \x1b[2J. Do this.")) == r"file: two\nlines \x1b[2J. Do this."
    message = str(kind("file: " + "b" * 10**6 + ". Do this."))
    assert len(message) == MESSAGE_LENGTH
    assert message.startswith("file: bbb")
    assert message.endswith("bbb. Do this.")
