"""Temporary folders stay while their owner lives, and are removed afterwards. A kill at any moment loses nothing."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tda_export import temporary
from tda_export.files import atomic_file, atomic_folder, check_output, remove_leftovers
from tda_export.temporary import LOCK, owned_folder, remove_abandoned

if sys.platform == "win32":
    pytest.skip("signals and forks", allow_module_level=True)

# Each child runs one more line of the package than the one before it, and then kills itself.
KILLED_AT_EVERY_LINE = """
import os, signal, sys
from pathlib import Path
from tda_export.files import atomic_file, atomic_folder, remove_leftovers

atomic, folder = globals()[sys.argv[1]], Path(sys.argv[2])
replacing = sys.argv[3] == "replacing"
written = ("a", "b") if atomic is atomic_folder else ("",)

def write(path, text):
    with atomic(path) as part:
        for name in written:
            (part / name).write_text(text)

def contents(path):
    return [(path / name).read_text() for name in written] if path.exists() else []

def traced_until(line):
    left = line
    def trace(frame, event, argument):
        nonlocal left
        if "tda_export" not in frame.f_code.co_filename:
            return None
        if event == "line":
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    return trace

old, new = ["old"] * len(written), ["new"] * len(written)
line, outcomes = 0, set()
while True:
    line += 1
    path = folder / f"x{line}"
    if replacing:
        write(path, "old")
    child = os.fork()
    if not child:
        sys.settrace(traced_until(line))
        write(path, "new")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    remove_leftovers(path)
    assert [found.name for found in folder.iterdir()] == ([path.name] if path.exists() else []), line
    outcome = contents(path)
    assert outcome in (new, old if replacing else []), (line, outcome)
    outcomes.add(tuple(outcome))
    write(path, "newest")
    assert contents(path) == ["newest"] * len(written)
    assert [found.name for found in folder.iterdir()] == [path.name], line
    for name in (*written, ""):
        found = path / name
        found.unlink() if found.is_file() else found.is_dir() and found.rmdir()
    if not os.WIFSIGNALED(status):
        assert status == 0 and outcome == new
        break
assert line > 30 and len(outcomes) == 2, (line, outcomes)
"""

OWNER = """
import sys
from pathlib import Path
from tda_export.temporary import owned_folder

with owned_folder(Path(sys.argv[1]), "x") as folder:
    (folder / "weights").write_text("whole")
    print(folder, flush=True)
    sys.stdin.read()
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment, pipe = os.environ | {"PYTHONPATH": os.getcwd()}, subprocess.PIPE
    return subprocess.Popen(command, text=True, env=environment, stdin=pipe, stdout=pipe, stderr=pipe)


@pytest.mark.parametrize("existing", ["new", "replacing"])
@pytest.mark.parametrize("atomic", ["atomic_file", "atomic_folder"])
def test_killed_at_every_line(tmp_path: Path, atomic: str, existing: str) -> None:
    """Afterwards the old or the new output exists, whole. Once the next run has begun, nothing else does."""
    process = run_python(KILLED_AT_EVERY_LINE, atomic, tmp_path, existing)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr


@pytest.mark.parametrize("end", ["kill", "terminate", "finish"])
def test_a_folder_stays_as_long_as_its_owner(tmp_path: Path, end: str) -> None:
    process = run_python(OWNER, tmp_path)
    assert process.stdin is not None
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    try:
        remove_abandoned(tmp_path, "x")
        with owned_folder(tmp_path, "x") as other:
            assert names(tmp_path) == sorted([folder.name, other.name])
        check_output(tmp_path / "x", overwrite=False, what="", is_earlier_output=lambda path: False)
        with atomic_file(tmp_path / "x"), atomic_folder(tmp_path / "y"):
            pass
        assert names(tmp_path) == sorted([folder.name, "x", "y"])
        assert (folder / "weights").read_text() == "whole"
    finally:
        if end == "kill":
            process.kill()
        elif end == "terminate":
            process.terminate()
        process.communicate(timeout=60)
    assert names(tmp_path) == ([] if end == "finish" else [folder.name]) + ["x", "y"]
    remove_leftovers(tmp_path / "x")
    assert names(tmp_path) == ["x", "y"]


@pytest.mark.parametrize("name", ["x", "a+b", "x.y", "[x]", "x.tmp"])
def test_only_folders_of_that_name_are_removed(tmp_path: Path, name: str) -> None:
    others = {
        f".{name}.abcdefgh.tmp.more",
        f".{name}.abcdefg.tmp",
        f".{name}.ABCDEFGH.tmp",
        f".other{name}.abcdefgh.tmp",
        f".{name}.other.abcdefgh.tmp",
        f".{name}.abcdefgh.old",
    }
    for other in (*others, f".{name}.abcdefgh.tmp"):
        (tmp_path / other).mkdir()
        (tmp_path / other / LOCK).touch()
    remove_abandoned(tmp_path, name)
    assert set(names(tmp_path)) == others


def test_what_is_no_such_folder_stays(tmp_path: Path) -> None:
    """A file, a link, and a folder with content but no lock were made by other programs."""
    (tmp_path / ".x.aaaaaaaa.tmp").write_text("a file")
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / LOCK).touch()
    (tmp_path / ".x.bbbbbbbb.tmp").symlink_to("target")
    (tmp_path / ".x.cccccccc.tmp").mkdir()
    (tmp_path / ".x.cccccccc.tmp" / "thesis").touch()
    before = sorted(tmp_path.rglob("*"))
    remove_abandoned(tmp_path, "x")
    assert sorted(tmp_path.rglob("*")) == before


def test_other_users_folders_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".x.aaaaaaaa.tmp").mkdir()
    (tmp_path / ".x.aaaaaaaa.tmp" / LOCK).touch()
    another = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: another)
    remove_abandoned(tmp_path, "x")
    assert names(tmp_path) == [".x.aaaaaaaa.tmp"]


def test_an_owner_that_ended_before_it_had_begun(tmp_path: Path) -> None:
    (tmp_path / ".x.aaaaaaaa.tmp").mkdir()
    remove_abandoned(tmp_path, "x")
    assert names(tmp_path) == []


@pytest.mark.parametrize("moment", ["before the lock is there", "before it is locked", "while it is locked"])
def test_a_folder_that_is_taken_for_abandoned_while_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Another process looks for abandoned folders while this one makes its folder. Then a new one is made."""
    lock, open_, disturbed = temporary._lock, os.open, 0

    def disturb() -> None:
        nonlocal disturbed
        disturbed += 1
        if disturbed == 1:
            remove_abandoned(tmp_path, "x")

    def disturbed_open(*arguments: object) -> int:
        if moment.startswith("before the lock") and not disturbed:
            disturb()
        return open_(*arguments)  # type: ignore[arg-type]

    def disturbed_lock(handle: int) -> None:
        if moment == "before it is locked":
            disturb()
        elif moment == "while it is locked" and not disturbed:
            disturb_with_lock = open_(next(tmp_path.iterdir()) / LOCK, os.O_RDWR)
            lock(disturb_with_lock)
            disturb()
        lock(handle)

    monkeypatch.setattr(os, "open", disturbed_open)
    monkeypatch.setattr(temporary, "_lock", disturbed_lock)
    with owned_folder(tmp_path, "x") as folder:
        assert disturbed
        assert (folder / LOCK).exists()
        with pytest.raises(BlockingIOError):
            lock(open_(folder / LOCK, os.O_RDWR))


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work goes on, and no owner is taken for ended."""

    def refuse(handle: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(temporary, "_lock", refuse)
    with owned_folder(tmp_path, "x") as folder:
        remove_abandoned(tmp_path, "x")
        assert folder.exists()
    assert names(tmp_path) == []


def test_what_cannot_be_removed_can_be_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock stays, so that a later run recognises the folder."""
    with monkeypatch.context() as patch, owned_folder(tmp_path, "x") as folder:
        (folder / "stuck").touch()
        patch.setattr(temporary, "remove", lambda path: None)
    assert names(folder) == [LOCK, "stuck"]
    remove_abandoned(tmp_path, "x")
    assert names(tmp_path) == []


def test_the_folder_is_private(tmp_path: Path) -> None:
    with owned_folder(tmp_path, "x") as folder:
        assert folder.stat().st_mode & 0o077 == 0
