"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tda_export.errors import TdaError, UsageError


def check_output(path: Path, *, overwrite: bool, what: str, is_earlier_output: Callable[[Path], bool]) -> None:
    """Refuse an output that cannot or must not be written, before any long work.

    Args:
        path: The file or folder to create.
        overwrite: Whether an earlier output may be replaced.
        what: What is written, such as "an artifact".
        is_earlier_output: Tells whether what is there was written by this command, so that nothing else is replaced.

    Raises:
        UsageError: It exists and `overwrite` is off or it is no earlier output, or its parent folder is missing or
            read-only.
    """
    parent = path.absolute().parent
    if not parent.is_dir():
        raise UsageError(f"{path}: the folder {parent} does not exist. Create it first.")
    if not os.access(parent, os.W_OK):
        raise UsageError(f"{path}: the folder {parent} is not writable. Choose another output.")
    if not (path.exists() or path.is_symlink()):
        return
    replaceable = is_earlier_output(path)
    if not overwrite:
        way_out = ", or replace it with --overwrite" if replaceable else ""
        raise UsageError(f"{path} exists. Choose another output{way_out}.")
    if not replaceable:
        raise UsageError(f"{path} exists and is not {what}, so it is not replaced. Choose another output.")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling that is fsynced and renamed to `path` on success, and removed on any failure.

    Raises:
        TdaError: The operating system refused to write.
    """
    parent = path.absolute().parent
    with _readable_errors(path):
        handle, name = tempfile.mkstemp(dir=parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        part = Path(name)
        try:
            yield part
            _fsync(part)
            part.chmod(0o666 & ~_umask())
            part.replace(path)
            _fsync(parent)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder that is fsynced and renamed to `path` on success, and removed on any failure.

    An existing folder at `path` is replaced, and put back if the replacement fails.

    Raises:
        TdaError: The operating system refused to write.
    """
    parent = path.absolute().parent
    with _readable_errors(path):
        part = Path(tempfile.mkdtemp(dir=parent, prefix=f".{path.name}.", suffix=".tmp"))
        try:
            yield part
            for file in part.iterdir():
                _fsync(file)
            part.chmod(0o777 & ~_umask())
            _swap(part, path)
            _fsync(parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def sha256(path: Path, advance: Callable[[int], None] = lambda size: None) -> str:
    """Hash a file; `advance` is called with the bytes of each block."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def _swap(part: Path, path: Path) -> None:
    if not path.exists():
        part.rename(path)
        return
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    path.rename(old)
    try:
        part.rename(path)
    except BaseException:
        try:
            old.rename(path)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; the earlier one is now {old}") from error
        raise
    if old.is_symlink():
        old.unlink()
    else:
        shutil.rmtree(old, ignore_errors=True)


def _fsync(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:
        if path.is_file():  # some systems cannot sync a folder; a file they must
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def _readable_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        where = "" if error.filename is None or str(path.name) in str(error.filename) else f": {error.filename}"
        way_out = "Free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Check the disk"
        raise TdaError(
            f"{path}: could not be written ({reason}{where}). Nothing was left behind. {way_out}, "
            "or choose another output."
        ) from error
