"""Files and folders that appear atomically."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from tda_export.errors import TdaError, UsageError
from tda_export.temporary import Rescue, owned_folder, remove, remove_abandoned

FREE_SPACE, WRITABLE = "Free some space, or choose", "Make its folder writable, or choose"
WAYS_OUT = {
    errno.ENOSPC: FREE_SPACE,
    errno.EDQUOT: FREE_SPACE,
    errno.EACCES: WRITABLE,
    errno.EPERM: WRITABLE,
    errno.EROFS: WRITABLE,
    errno.EFBIG: "Raise the limit on the size of files, or choose",
    errno.ENAMETOOLONG: "Choose a shorter name for it, or",
}  # and then "another output."
NEW = "new"  # the output being written; a fixed name, since the user's own may equal OLD or REPLACED
OLD = "old"  # an earlier output, moved away for a moment
REPLACED = "replaced"  # the earlier output, once the new one is in place


def check_output(path: Path, *, overwrite: bool, what: str, is_earlier_output: Callable[[Path], bool]) -> None:
    """Check before any long work that an output can and may be written.

    Leftovers of killed runs are removed first (`remove_leftovers`).

    Args:
        path: The file or folder to create.
        overwrite: Whether an earlier output may be replaced.
        what: What is written, such as "an artifact".
        is_earlier_output: Returns whether this command wrote the existing output. Nothing else is replaced.

    Raises:
        UsageError: The output exists and `overwrite` is off, it exists and is no earlier output, it is a pipe or a
            device, or its parent folder is missing or read-only.
    """
    parent = path.absolute().parent
    if not parent.is_dir():
        raise UsageError(f"{path}: the folder {parent} does not exist. Create it first.")
    if not os.access(parent, os.W_OK):
        raise UsageError(f"{path}: the folder {parent} is not writable. Choose another output.")
    remove_leftovers(path)
    if not (path.exists() or path.is_symlink()):
        return
    if path.exists() and not (path.is_file() or path.is_dir()):  # to read a pipe could take forever
        raise UsageError(f"{path} is a pipe or a device. Choose another output.")
    replaceable = is_earlier_output(path)
    if not overwrite:
        way_out = ", or replace it with --overwrite" if replaceable else ""
        raise UsageError(f"{path} exists. Choose another output{way_out}.")
    if not replaceable:
        raise UsageError(f"{path} exists and is not {what}, so it is not replaced. Choose another output.")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file that is fsynced and renamed to `path` on success, and removed on any failure.

    Leftovers of killed runs are removed first.

    Raises:
        TdaError: The operating system refused to write.
    """
    parent = path.absolute().parent
    with _readable_errors(path), owned_folder(parent, path.name) as folder:
        part = folder / NEW
        part.touch()
        yield part
        _fsync(part)
        part.replace(path)
        _fsync(parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that is fsynced and renamed to `path` on success, and removed on any failure.

    An existing folder at `path` is replaced. If the replacement fails, this process puts it back; if this process is
    killed at that moment, the next one that writes to `path` does. Leftovers of killed runs are removed first.

    Raises:
        TdaError: The operating system refused to write.
    """
    parent = path.absolute().parent
    with _readable_errors(path), owned_folder(parent, path.name, _put_back(path)) as folder:
        part = folder / NEW
        part.mkdir()
        yield part
        for file in part.iterdir():
            _fsync(file)
        if os.path.lexists(path):
            path.rename(folder / OLD)
        part.rename(path)
        _fsync(parent)


def remove_leftovers(path: Path) -> None:
    """Remove what killed runs left of an output, and put back an earlier output that they had moved away."""
    remove_abandoned(path.absolute().parent, path.name, _put_back(path))


def _put_back(path: Path) -> Rescue:
    def put_back(folder: Path) -> None:
        """Put the earlier output back if the new one was never put in place; otherwise make sure that no later run
        does."""
        if not os.path.lexists(folder / OLD):
            return
        if os.path.lexists(path):
            (folder / OLD).rename(folder / REPLACED)
            return
        try:
            (folder / OLD).rename(path)
        except OSError as error:
            remove(folder / NEW)
            raise TdaError(
                f"{path}: could not be replaced ({error.strerror or error}). The earlier one is {folder / OLD}; the "
                "next run with this output puts it back."
            ) from error

    return put_back


def as_os_error(error: Exception) -> OSError:
    """Return the operating system's error, where a library written in Rust reports it as text only."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else OSError(str(error))


def sha256(path: Path, advance: Callable[[int], None] = lambda size: None) -> str:
    """Hash a file; `advance` is called with the bytes of each block."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:
        if path.is_file():  # some systems cannot sync a folder; every system must sync a file
            raise


@contextlib.contextmanager
def _readable_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        where = "" if error.filename is None or str(path.name) in str(error.filename) else f": {error.filename}"
        left = "The earlier one is as it was" if os.path.lexists(path) else "Nothing was left behind"
        way_out = WAYS_OUT.get(error.errno or 0, "Check the disk, or choose")
        raise TdaError(f"{path}: could not be written ({reason}{where}). {left}. {way_out} another output.") from error
