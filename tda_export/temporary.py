"""Temporary folders that a process owns: nobody removes them while it lives; afterwards the next process does.

A process owns a folder through a lock on a file in it. The operating system releases the lock when the process ends,
however it ends. Where the file system has no locks, the folder of a killed process stays.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tda_export.signals import undo_on_signal

if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> None:
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


LOCK = "lock"
SUFFIX = ".tmp"
RANDOM = "[a-z0-9_]{8}"  # tempfile's part of a name

Rescue = Callable[[Path], None]


def nothing(folder: Path) -> None:
    """Rescue nothing from a folder that is to be removed."""


@contextlib.contextmanager
def owned_folder(parent: Path, name: str, rescue: Rescue = nothing) -> Iterator[Path]:
    """Make a private folder `.{name}.????????.tmp`, which holds its lock, and remove it afterwards.

    Folders of that name left by processes that have ended are removed first.

    Args:
        parent: The folder to make it in, which must exist.
        name: What the folder is for. Folders of equal names are of the same kind.
        rescue: Called with a folder before it is removed. If it raises, the folder stays.

    Raises:
        OSError: The operating system refuses to make it, or `rescue` failed.
    """
    remove_abandoned(parent, name, rescue)
    folder, handle = _make(parent, name)
    with undo_on_signal(lambda: _remove(folder, handle, rescue)):
        try:
            yield folder
        finally:
            _remove(folder, handle, rescue)


def remove_abandoned(parent: Path, name: str, rescue: Rescue = nothing) -> None:
    """Remove the folders of `owned_folder` that no living process owns. What cannot be removed stays."""
    pattern = re.compile(rf"\.{re.escape(name)}\.{RANDOM}{re.escape(SUFFIX)}")
    try:
        names = os.listdir(parent)
    except OSError:
        return
    for folder in (parent / name for name in names if pattern.fullmatch(name)):
        with contextlib.suppress(OSError):
            if not _is_ours(folder):
                continue
            if not (folder / LOCK).exists():
                folder.rmdir()  # the owner ended before it had begun; other people's folders are not empty
            elif (handle := _own(folder)) is not None:
                _remove(folder, handle, rescue)


def _make(parent: Path, name: str) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=f".{name}.", suffix=SUFFIX))
        try:
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:
            continue  # another process removed the folder before it was locked
        except OSError:
            folder.rmdir()
            raise
        try:
            _lock(handle)
        except (BlockingIOError, PermissionError):
            os.close(handle)  # as above
        except OSError:
            return folder, handle  # no locks here, so nobody takes the folder for abandoned
        else:
            if _is_at(handle, folder / LOCK):
                return folder, handle
            os.close(handle)


def _is_ours(folder: Path) -> bool:
    """Return whether this is a folder, not a link to one, and this user's. In /tmp anybody may have put something
    else."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and (not hasattr(os, "geteuid") or found.st_uid == os.geteuid())


def _own(folder: Path) -> int | None:
    """Take the lock of a folder, if nobody has it."""
    handle = os.open(folder / LOCK, os.O_RDWR)
    try:
        _lock(handle)
        if _is_at(handle, folder / LOCK):
            return handle
    except OSError:
        pass
    os.close(handle)
    return None


def _is_at(handle: int, path: Path) -> bool:
    """Return whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _remove(folder: Path, handle: int, rescue: Rescue) -> None:
    """Remove a folder whose lock is held. The lock goes last, so that a kill meanwhile leaves an abandoned folder."""
    try:
        rescue(folder)
        for path in folder.iterdir():
            if path.name != LOCK:
                remove(path)
    except FileNotFoundError:
        pass  # the user has removed it
    finally:
        with contextlib.suppress(OSError):
            os.close(handle)
    with contextlib.suppress(OSError):
        if [path.name for path in folder.iterdir()] == [LOCK]:  # without the lock, the rest would stay for ever
            (folder / LOCK).unlink()
            folder.rmdir()


def remove(path: Path) -> None:
    """Delete a file, a link or a folder as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
