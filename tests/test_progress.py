"""Progress: a bar on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import io
import sys

import pytest

from tda_export import progress as progress_module
from tda_export.progress import progress


class Clock:
    """A clock that moves only when a test sets it."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def test_lines_come_at_intervals(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("Writing weights", 8) as advance:
        for now in (4.0, 10.0, 11.0, 19.9, 20.0, 40.0):
            clock.now = now
            advance(1)
    assert capsys.readouterr() == (
        "",
        "Writing weights: 25%\nWriting weights: 62%\nWriting weights: 75%\n",
    )


def test_a_finished_step_needs_no_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("Writing", 2) as advance:
        clock.now = 100.0
        advance(2)
    assert capsys.readouterr() == ("", "")


def test_empty_step(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("Writing", 0) as advance:
        clock.now = 100.0
        advance(0)
    assert capsys.readouterr() == ("", "")


def test_quiet(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("Writing", 4, quiet=True) as advance:
        clock.now = 100.0
        advance(1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("quiet", [False, True])
def test_errors_pass_through(quiet: bool) -> None:
    with pytest.raises(KeyboardInterrupt), progress("Writing", 4, quiet=quiet):
        raise KeyboardInterrupt


class Terminal(io.StringIO):
    """A standard error that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("Writing", 4) as advance:
        advance(4)
    assert "Writing" in terminal.getvalue()
    assert "100%" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_quiet_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("Writing", 4, quiet=True) as advance:
        advance(4)
    assert terminal.getvalue() == ""
