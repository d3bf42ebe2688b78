"""Signals end a process at any point. Every test runs processes of its own."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

if sys.platform == "win32":
    pytest.skip("POSIX signals", allow_module_level=True)

SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "terminate"])
ENVIRONMENT = os.environ | {"PYTHONPATH": os.getcwd()}

# Code that swallows exceptions. An exception that a signal handler raised inside it would be lost.
SWALLOWERS = {
    "destructor": """
class Waits:
    def __del__(self): wait()
while True: Waits()
""",
    "callback from C": """
import ctypes
wait_in_c = ctypes.CFUNCTYPE(None)(wait)
while True: wait_in_c()
""",
    "bare except": """
while True:
    try: wait()
    except BaseException: pass
""",
    "import": """
import sys
class Finder:
    def find_spec(self, *arguments): wait()
sys.meta_path.insert(0, Finder())
while True:
    try: import no_such_module
    except ImportError: pass
""",
    "garbage collection": """
import gc
gc.callbacks.append(lambda phase, info: wait())
while True: gc.collect()
""",
}
START = """
import sys, time
from pathlib import Path
from tda_export.signals import end_on_signals, undo_on_signal
from tda_export.temporary import owned_folder
end_on_signals()
ready = False
def wait():
    global ready
    if not ready:
        print("ready", flush=True)
    ready = True
    time.sleep(0.05)
"""
UNDOING = """
import os
def undo_and_fail():
    os.write(1, b"undone\\n")  # the signal may come amid a print, which is not reentrant
    raise RuntimeError
with owned_folder(Path(sys.argv[1]), "x") as folder, undo_on_signal(undo_and_fail), undo_on_signal(undo_and_fail):
    (folder / "weights").touch()
    while True: wait()
"""


def heed_interrupts() -> None:
    """Restore SIGINT, which a test run in the background of a shell ignores, as would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_python(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, *map(str, arguments)]
    settings: dict[str, Any] = {
        "env": ENVIRONMENT,
        "text": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "preexec_fn": heed_interrupts,
    }
    return subprocess.Popen(command, **settings | options)


def end_once_ready(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """Send the signal once the process is ready. Check how it ends, and return the rest of its output."""
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert stderr == ("Interrupted.\n" if number == signal.SIGINT else "")
    return stdout


@SIGNALS
@pytest.mark.parametrize("where", SWALLOWERS)
def test_nothing_swallows_a_signal(number: signal.Signals, where: str) -> None:
    end_once_ready(run_python("-c", START + SWALLOWERS[where]), number)


@SIGNALS
def test_what_was_under_way_is_undone(tmp_path: Path, number: signal.Signals) -> None:
    """All of it, even if one undo fails."""
    assert end_once_ready(run_python("-c", START + UNDOING, tmp_path), number) == "undone\nundone\n"
    assert list(tmp_path.iterdir()) == []


@SIGNALS
def test_the_cursor_comes_back(number: signal.Signals) -> None:
    """A progress bar hides it."""
    code = """
import os
from tda_export.progress import progress
with progress("Waiting", 10):
    os.write(1, b"ready\\n")  # what is printed goes above the bar
    while True: time.sleep(0.05)
"""
    ours, theirs = os.openpty()
    environment = ENVIRONMENT | {"TERM": "xterm"}
    process = run_python("-c", START + code, stderr=theirs, env=environment)
    os.close(theirs)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    shown = b""
    with contextlib.suppress(OSError):  # raised when the other end of the terminal is closed
        while block := os.read(ours, 4096):
            shown += block
    os.close(ours)
    process.stdout.close()
    assert b"\x1b[?25l" in shown
    assert b"\x1b[?25h" in shown.rpartition(b"\x1b[?25l")[2]


def test_a_child_leaves_its_parents_work_alone(tmp_path: Path) -> None:
    code = """
import os, signal
with owned_folder(Path(sys.argv[1]), "x") as folder:
    child = os.fork()
    if not child:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
    assert folder.exists()
"""
    process = run_python("-c", START + code, tmp_path)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_an_undoing_that_hangs_is_cut_off() -> None:
    code = """
import tda_export.signals
tda_export.signals.UNDO_SECONDS = 0.1
with undo_on_signal(lambda: time.sleep(600)):
    while True: wait()
"""
    process = run_python("-c", START + code)
    assert process.stdout is not None
    process.stdout.readline()
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGALRM


def test_an_ignored_interrupt_stays_ignored() -> None:
    """A shell starts background jobs with SIGINT ignored."""
    code = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nprint('goes on')"
    process = run_python("-c", START + code, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert process.communicate(timeout=60) == ("goes on\n", "")


def handles_signals(process: subprocess.Popen[str]) -> bool:
    """Return whether a process has a handler for SIGTERM, which its first lines install."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc tells when a process handles signals")
@SIGNALS
@pytest.mark.parametrize("module", ["tda_export.__main__", "tda_export.cli.main"])
def test_the_first_moments_of_a_command(tmp_path: Path, number: signal.Signals, module: str) -> None:
    """Before and during its imports."""
    seeded = random.Random(number)
    for moment in [0.0, *(seeded.uniform(0, 1.0) for _ in range(4))]:
        code = f"from {module} import main; main()"
        process = run_python("-c", code, "calibrate", tmp_path, "-o", tmp_path / "x", stdin=subprocess.DEVNULL)
        while not handles_signals(process):
            assert process.poll() is None
        time.sleep(moment)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
        if process.returncode == 1:  # it failed before the signal came, since an empty folder is no model
            assert stderr.startswith("Error: "), moment
        else:
            assert process.returncode == 128 + number, (moment, stderr)
            assert (stdout, stderr) == ("", "Interrupted.\n" if number == signal.SIGINT else ""), moment
