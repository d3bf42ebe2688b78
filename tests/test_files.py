"""Files and folders are written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tda_export.errors import TdaError, UsageError
from tda_export.files import as_os_error, atomic_file, atomic_folder, check_output, sha256

Atomic = Callable[[Path], AbstractContextManager[Path]]


def check(path: Path, *, overwrite: bool, earlier: bool = True) -> None:
    """Call check_output as a command that takes any existing output for its own earlier one, or none."""
    check_output(path, overwrite=overwrite, what="an artifact", is_earlier_output=lambda found: earlier)


def put(part: Path, content: str) -> None:
    """Write `content` to a file, or into a folder."""
    (part / "a" if part.is_dir() else part).write_text(content)


def content(path: Path) -> str:
    return (path / "a" if path.is_dir() else path).read_text()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=[atomic_file, atomic_folder], ids=["file", "folder"])
def atomic(request: pytest.FixtureRequest) -> Atomic:
    return request.param


def fail_halfway(atomic: Atomic, path: Path, error: BaseException) -> None:
    with atomic(path) as part:
        put(part, "half")
        raise error


def os_error(number: int, filename: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), filename)


def full_disk() -> OSError:
    return os_error(errno.ENOSPC)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_pipe_is_no_output(tmp_path: Path, overwrite: bool) -> None:
    """It is refused before anybody reads it, which could take forever."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    for path in (pipe, tmp_path / "link", Path("/dev/null")):
        with pytest.raises(UsageError, match=r"is a pipe or a device\. Choose another output\.$"):
            check_output(path, overwrite=overwrite, what="", is_earlier_output=lambda path: bool(path.read_bytes()))


def test_appears_when_done(atomic: Atomic, tmp_path: Path) -> None:
    with atomic(tmp_path / "x") as part:
        put(part, "new")
        assert part.parent.parent == tmp_path  # on the same file system, so that the rename is atomic
        assert not (tmp_path / "x").exists()
    assert names(tmp_path) == ["x"]
    assert content(tmp_path / "x") == "new"


def test_replaces(atomic: Atomic, tmp_path: Path) -> None:
    for text in ("old", "new"):
        with atomic(tmp_path / "x") as part:
            put(part, text)
            assert not (tmp_path / "x").exists() or content(tmp_path / "x") == "old"
    assert names(tmp_path) == ["x"]
    assert content(tmp_path / "x") == "new"


def test_replaced_folder_keeps_nothing_of_the_old(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "stale").touch()
    with atomic_folder(tmp_path / "x") as part:
        put(part, "new")
    assert names(tmp_path / "x") == ["a"]


def test_relative_path(atomic: Atomic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with atomic(Path("x")) as part:
        put(part, "new")
    assert names(tmp_path) == ["x"]


def test_permissions_are_the_umasks(atomic: Atomic, tmp_path: Path) -> None:
    """Only the owner can read temporary files; results can be read as the umask allows."""
    before = os.umask(0o027)
    try:
        with atomic(tmp_path / "x") as part:
            put(part, "new")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    expected = 0o750 if (tmp_path / "x").is_dir() else 0o640
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == expected


@pytest.mark.parametrize("existing", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize(
    "error",
    [RuntimeError("x"), KeyboardInterrupt(), SystemExit(143), TdaError("x")],
    ids=lambda error: type(error).__name__,
)
def test_failure_leaves_nothing(atomic: Atomic, tmp_path: Path, error: BaseException, existing: bool) -> None:
    if existing:
        with atomic(tmp_path / "x") as part:
            put(part, "old")
    with pytest.raises(type(error)) as raised:
        fail_halfway(atomic, tmp_path / "x", error)
    assert raised.value is error
    assert names(tmp_path) == (["x"] if existing else [])
    assert not existing or content(tmp_path / "x") == "old"


@pytest.mark.parametrize("name", ["new", "old", "replaced", "lock", "wheels"])
def test_no_name_of_an_output_is_in_the_way(atomic: Atomic, tmp_path: Path, name: str) -> None:
    """Not even names of files in the temporary folder."""
    for text in ("first", "second"):
        with pytest.raises(RuntimeError, match="halfway"):
            fail_halfway(atomic, tmp_path / name, RuntimeError("halfway"))
        assert names(tmp_path) == ([] if text == "first" else [name])
        with atomic(tmp_path / name) as part:
            put(part, text)
        assert names(tmp_path) == [name]
        assert content(tmp_path / name) == text


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (full_disk(), "(No space left on device). Nothing was left behind. Free some space, or"),
        (os_error(errno.EDQUOT), "(Disk quota exceeded). Nothing was left behind. Free some space, or"),
        (os_error(errno.EIO), "(Input/output error). Nothing was left behind. Check the disk, or"),
        (
            os_error(errno.EACCES, "/other/file"),
            "(Permission denied: /other/file). Nothing was left behind. Make its folder writable, or",
        ),
        (os_error(errno.EROFS), "(Read-only file system). Nothing was left behind. Make its folder writable, or"),
        (os_error(errno.EFBIG), "(File too large). Nothing was left behind. Raise the limit on the size of files, or"),
        (os_error(errno.ENAMETOOLONG), "(File name too long). Nothing was left behind. Choose a shorter name for it, "),
        (OSError("a library's own words"), "(a library's own words). Nothing was left behind. Check the disk, or"),
    ],
    ids=["full", "quota", "damaged", "another file", "read-only", "large", "long", "no number"],
)
def test_the_operating_system_refuses(atomic: Atomic, tmp_path: Path, error: OSError, text: str) -> None:
    with pytest.raises(TdaError) as raised:
        fail_halfway(atomic, tmp_path / "x", error)
    assert str(raised.value).startswith(f"{tmp_path / 'x'}: could not be written {text}")
    assert str(raised.value).endswith("another output.")
    assert names(tmp_path) == []


def test_the_operating_system_refuses_a_replacement(atomic: Atomic, tmp_path: Path) -> None:
    with atomic(tmp_path / "x") as part:
        put(part, "old")
    text = r"x: could not be written \(No space left on device\). The earlier one is as it was. Free some space, or"
    with pytest.raises(TdaError, match=text), atomic(tmp_path / "x") as part:
        raise full_disk()
    assert content(tmp_path / "x") == "old"


@pytest.mark.parametrize(
    ("text", "number", "reason"),
    [
        ("Error while serializing: I/O error: No space left on device (os error 28)", 28, "No space left on device"),
        ("Permission denied (os error 13)", 13, "Permission denied"),
        ("Error: something else", None, None),
    ],
)
def test_what_libraries_written_in_rust_say(text: str, number: int | None, reason: str | None) -> None:
    error = as_os_error(RuntimeError(text))
    assert (error.errno, error.strerror) == (number, reason)
    assert str(error) == (text if number is None else f"[Errno {number}] {reason}")


def test_the_temporary_name_is_not_shown(atomic: Atomic, tmp_path: Path) -> None:
    """An error names the output, not its temporary file."""
    with pytest.raises(TdaError, match=r"could not be written \(Permission denied\)"), atomic(tmp_path / "x") as part:
        raise os_error(errno.EACCES, str(part))


@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_full_disk_at_the_start(atomic: Atomic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """On a disk without free inodes, the temporary folder or the lock in it cannot be made."""

    def refuse(*arguments: object) -> None:
        raise full_disk()

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(TdaError, match="No space left on device"), atomic(tmp_path / "x"):
            pass
    assert names(tmp_path) == []


def test_parent_that_went_away(atomic: Atomic, tmp_path: Path) -> None:
    """The parent existed at check_output, and was deleted during the work."""
    with pytest.raises(TdaError, match="No such file or directory"), atomic(tmp_path / "gone" / "x"):
        pass


def failing_renames(monkeypatch: pytest.MonkeyPatch, *failing: int) -> None:
    """Let the renames with these numbers fail, counted from 1."""
    rename, count = Path.rename, 0

    def maybe(path: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count in failing:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", maybe)


@pytest.mark.parametrize("failing", [1, 2], ids=["moving the old away", "moving the new there"])
def test_failed_rename_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    with atomic_folder(tmp_path / "x") as part:
        put(part, "old")
    failing_renames(monkeypatch, failing)
    with pytest.raises(TdaError, match="busy"), atomic_folder(tmp_path / "x") as part:
        put(part, "new")
    assert content(tmp_path / "x") == "old"
    assert names(tmp_path) == ["x"]


def test_the_old_folder_is_never_deleted_before_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it cannot be put back, it stays beside the output under another name, and the next run puts it back."""
    with atomic_folder(tmp_path / "x") as part:
        put(part, "old")
    with monkeypatch.context() as patch:
        failing_renames(patch, 2, 3)
        text = r"x: could not be replaced \(.*busy\). The earlier one is .*/old; the next run with this output puts it"
        with pytest.raises(TdaError, match=text), atomic_folder(tmp_path / "x") as part:
            put(part, "new")
    assert [path.read_text() for path in tmp_path.rglob("a")] == ["old"]
    with pytest.raises(UsageError, match="exists"):
        check(tmp_path / "x", overwrite=False)
    assert names(tmp_path) == ["x"]
    assert content(tmp_path / "x") == "old"


def test_failed_rename_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_text("old")

    def refuse(path: Path, target: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(TdaError, match="busy"), atomic_file(tmp_path / "x") as part:
        put(part, "new")
    assert names(tmp_path) == ["x"]
    assert content(tmp_path / "x") == "old"


def test_everything_is_synced_before_the_rename(
    atomic: Atomic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut the name must not exist without the content."""
    events: list[str] = []
    fsync = os.fsync

    def record_fsync(handle: int) -> None:
        events.append("sync folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "sync file")
        fsync(handle)

    def recording(call: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def record(path: Path, target: Path) -> Path:
            events.append("rename")
            return call(path, target)

        return record

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", recording(Path.rename))
    monkeypatch.setattr(Path, "replace", recording(Path.replace))
    with atomic(tmp_path / "x") as part:
        put(part, "new")
    assert events[0] == "sync file"
    assert events[-2:] == ["rename", "sync folder"]


@pytest.mark.parametrize("size", [0, 1, (1 << 22) - 1, 1 << 22, (1 << 22) + 1])
def test_sha256(tmp_path: Path, size: int) -> None:
    path, data = tmp_path / "x", bytes(range(256)) * (size // 256) + bytes(size % 256)
    path.write_bytes(data)
    blocks: list[int] = []
    assert sha256(path, blocks.append) == sha256(path) == hashlib.sha256(data).hexdigest()
    assert sum(blocks) == size


@pytest.mark.parametrize("overwrite", [False, True])
def test_output_may_be_new(tmp_path: Path, overwrite: bool) -> None:
    check(tmp_path / "x", overwrite=overwrite, earlier=False)


def test_output_in_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a/x: the folder .*/a does not exist. Create it first"):
        check(tmp_path / "a" / "x", overwrite=False)


def test_output_in_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(UsageError, match="does not exist"):
        check(tmp_path / "a" / "x", overwrite=False)


def test_output_in_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write anywhere
    with pytest.raises(UsageError, match=r"is not writable. Choose another output"):
        check(tmp_path / "x", overwrite=True)


EXISTING = pytest.mark.parametrize(
    "make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("nowhere")], ids=["file", "folder", "dangling link"]
)


@EXISTING
@pytest.mark.parametrize("earlier", [False, True])
def test_output_that_exists(tmp_path: Path, make: Callable[[Path], None], earlier: bool) -> None:
    make(tmp_path / "x")
    advice = ", or replace it with --overwrite" if earlier else ""
    with pytest.raises(UsageError, match=rf"x exists\. Choose another output{advice}\.$"):
        check(tmp_path / "x", overwrite=False, earlier=earlier)


@EXISTING
def test_overwriting_an_earlier_output(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x")
    check(tmp_path / "x", overwrite=True, earlier=True)


@EXISTING
def test_only_an_earlier_output_is_overwritten(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x")
    with pytest.raises(UsageError, match=r"x exists and is not an artifact, so it is not replaced. Choose another"):
        check(tmp_path / "x", overwrite=True, earlier=False)


def test_the_earlier_output_is_asked_for_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    asked: list[Path] = []
    check_output(
        tmp_path / "x",
        overwrite=True,
        what="a calibration",
        is_earlier_output=lambda path: asked.append(path) is None,
    )
    assert asked == [tmp_path / "x"]


def test_overwriting_a_link_leaves_its_target(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "a").write_text("old")
    (tmp_path / "x").symlink_to("target")
    with atomic_folder(tmp_path / "x") as part:
        put(part, "new")
    assert (content(tmp_path / "x"), content(tmp_path / "target")) == ("new", "old")
    assert names(tmp_path) == ["target", "x"]
