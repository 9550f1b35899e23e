"""Files that are written only where nothing is, and names that change hands at once."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from outliermerge.errors import OutlierMergeError

_NOREPLACE, _EXCHANGE = 1, 2
_AT_FDCWD = -100
# What the kernel says where a file system, or it itself, cannot do that.
_UNABLE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)


def inode(path: Path) -> int | None:
    """Return the inode number of what has a name, or of a link; None where nothing has it."""
    try:
        return os.lstat(path).st_ino
    except (FileNotFoundError, NotADirectoryError):
        return None


def move_new(source: Path, target: Path) -> None:
    """Give a file or folder a name that nothing has.

    Raises:
        FileExistsError: something has it.
        OSError: the system refuses.
    """
    if not _renameat2(source, target, _NOREPLACE):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        source.rename(target)


def exchange(one: Path, other: Path) -> bool:
    """Give two files or folders each other's name at once; False where the system cannot.

    Raises:
        OSError: the system refuses, as where one of them is gone.
    """
    return _renameat2(one, other, _EXCHANGE)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Rename as Linux' renameat2 does; False where there is none."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    names = os.fsencode(source), os.fsencode(target)
    while call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], flags) != 0:
        number = ctypes.get_errno()
        if number in _UNABLE:
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number), str(source), None, str(target))
    return True


def files_in(folder: Path) -> Iterator[str]:
    """Yield what a folder holds, but its folders, by name in it; links are not followed."""
    pending = [folder]
    while pending:
        here = pending.pop()
        with os.scandir(here) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
                else:
                    yield Path(entry.path).relative_to(folder).as_posix()


def open_inside(folder: Path, name: str) -> int:
    """Open a file of a folder, to read and write, by its name in it, no part of which is a link.

    Raises:
        OSError: it cannot be opened; ELOOP or ENOTDIR where a part is a link.
    """
    with _home(folder, name) as (home, last):
        return os.open(last, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=home)


def make_inside(folder: Path, name: str) -> int:
    """Make a file of a folder, and the folders in its name; what had the name is removed.

    Raises:
        OSError: it cannot be made; ELOOP or ENOTDIR where a folder in the name is a link.
    """
    with _home(folder, name) as (home, last):
        with suppress(FileNotFoundError):
            os.unlink(last, dir_fd=home)
        return os.open(last, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=home)


@contextmanager
def _home(folder: Path, name: str) -> Iterator[tuple[int, str]]:
    """Open the folder that a file is in, made where it is missing; no part of it is a link."""
    *parents, last = name.split("/")
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    here = os.open(folder, flags)
    try:
        for parent in parents:
            with suppress(FileExistsError):
                os.mkdir(parent, dir_fd=here)
            inner = os.open(parent, flags, dir_fd=here)
            os.close(here)
            here = inner
        yield here, last
    finally:
        os.close(here)


def check_own(descriptor: int, path: Path) -> os.stat_result:
    """Return the status of an open file that only we write.

    Raises:
        OutlierMergeError: it is no regular file, or has a second name.
    """
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        what = "has a second name (a hard link)" if status.st_nlink > 1 else "is no regular file"
        raise OutlierMergeError(f"{path}: {what}, so that it may not be ours. Remove it.")
    return status


def remove_files(folder: Path, names: set[str]) -> None:
    """Remove files of a folder by their names in it, and folders that are empty then."""
    for name in sorted(files_in(folder)):
        if name in names:
            (folder / name).unlink()
    for root, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):  # it is not empty
            Path(root).rmdir()


def sync(path: Path) -> None:
    """Have a file or folder reach the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder in which one may write, and which one may not list
        os.sync()
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
