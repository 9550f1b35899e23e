"""File functions that differ between systems, each with a plain fallback.

Functions that not every system has are here (those not on files in `machine`). The code asks
whether a function exists, never which system this is. Files are opened without hanging, new files
never overwrite others, and renames are atomic.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from outliermerge.errors import OutlierMergeError
from outliermerge.storage.machine import c_library

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]
try:
    import msvcrt
except ImportError:
    msvcrt = None  # type: ignore[assignment]

_BLOCK_DEVICES = Path("/sys/dev/block")
# Without this flag some systems change line ends.
_BYTES = getattr(os, "O_BINARY", 0)
_AT_ONCE = getattr(os, "O_NONBLOCK", 0)
# The position of the one byte that is locked. No journal is that long: msvcrt's locks keep others
# from reading the locked byte.
_LOCKED_BYTE = 1 << 40
_SEEKING = threading.Lock()
_NOREPLACE, _EXCHANGE = 1, 2
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_AT_FDCWD = -100
# The errors with which the kernel says that it, or a file system, does not support a call.
_UNABLE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)


def inode(path: Path) -> int | None:
    """Return the inode number at a path, of a link itself; None if nothing is there."""
    try:
        return os.lstat(path).st_ino
    except (FileNotFoundError, NotADirectoryError):
        return None


def move_new(source: Path, target: Path) -> None:
    """Rename a file or folder to a name that must be free.

    Raises:
        FileExistsError: the name is taken.
        OSError: the system refuses.
    """
    if not _renameat2(source, target, _NOREPLACE):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        source.rename(target)


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two files or folders atomically; False if the system cannot.

    Raises:
        OSError: the system refuses, for example because one of them is gone.
    """
    return _renameat2(one, other, _EXCHANGE)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Rename with Linux's renameat2; False if the system has no such function."""
    library = c_library()
    call = getattr(library, "renameat2", None)
    if call is None:
        return False
    import ctypes

    names = os.fsencode(source), os.fsencode(target)
    while call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], flags) != 0:
        number = ctypes.get_errno()
        if number in _UNABLE:
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number), str(source), None, str(target))
    return True


def files_in(folder: Path) -> Iterator[str]:
    """Yield the relative names of all files under a folder; links are not followed."""
    pending = [folder]
    while pending:
        here = pending.pop()
        with os.scandir(here) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
                else:
                    yield Path(entry.path).relative_to(folder).as_posix()


def refuse_special(path: Path, mode: int) -> None:
    """Raise OutlierMergeError unless a path leads to a regular file."""
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise OutlierMergeError(f"{path}: is {what}, expected a regular file")


@contextmanager
def knowing(path: Path) -> Iterator[None]:
    """Name the file in errors of calls on a descriptor, which do not know the name."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def open_regular(path: Path) -> int:
    """Return the descriptor of a regular file, opened for reading.

    A pipe or a device is refused without waiting for its data.

    Raises:
        OSError: it cannot be opened.
        OutlierMergeError: it is not a regular file.
    """
    if not _AT_ONCE:  # opening it might wait
        refuse_special(path, path.stat().st_mode)
    descriptor = os.open(path, os.O_RDONLY | _BYTES | _AT_ONCE)
    try:
        with knowing(path):
            refuse_special(path, os.fstat(descriptor).st_mode)
            if _AT_ONCE:
                os.set_blocking(descriptor, True)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_to_append(path: Path) -> int:
    """Open a file to read it and to append to it; a missing file is made.

    Raises:
        OSError: it cannot be opened; ELOOP or EISDIR where it is a link or a folder.
    """
    return _open_no_link(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)


def open_inside(folder: Path, name: str) -> int:
    """Open a file of a folder to read and write, by its relative name; no part may be a link.

    Raises:
        OSError: it cannot be opened; ELOOP or ENOTDIR where a part is a link.
    """
    with _home(folder, name) as (home, last):
        return _open_no_link(last, os.O_RDWR, home)


def make_inside(folder: Path, name: str) -> int:
    """Make a file of a folder, and the folders in its name; an old file is removed first.

    Raises:
        OSError: it cannot be made; ELOOP or ENOTDIR where a folder in the name is a link.
    """
    with _home(folder, name) as (home, last):
        with suppress(FileNotFoundError):
            os.unlink(last, dir_fd=home)
        return os.open(last, os.O_RDWR | os.O_CREAT | os.O_EXCL | _BYTES, 0o644, dir_fd=home)


@contextmanager
def _home(folder: Path, name: str) -> Iterator[tuple[int | None, str]]:
    """Open the folder of a file; a missing folder is made, and no part may be a link.

    Yields:
        The folder's descriptor and the file's name in it. If the system cannot open files relative
        to a descriptor: None and the file's path; then the parts are checked one after the other.
    """
    *parents, last = name.split("/")
    if os.open not in os.supports_dir_fd or not hasattr(os, "O_NOFOLLOW"):
        place = folder
        for part in (None, *parents):
            if part is not None:
                place = place / part
                with suppress(FileExistsError):
                    place.mkdir()
            if not stat.S_ISDIR(_no_link(place).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
        yield None, str(place / last)
        return
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


def _open_no_link(path: str | Path, flags: int, home: int | None = None) -> int:
    """Open a file that is not a link; without O_NOFOLLOW it is checked before and after."""
    flags |= _BYTES | _AT_ONCE
    if hasattr(os, "O_NOFOLLOW"):
        return os.open(path, flags | os.O_NOFOLLOW, 0o644, dir_fd=home)
    with suppress(FileNotFoundError):
        if stat.S_ISDIR(_no_link(Path(path)).st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    descriptor = os.open(path, flags, 0o644)
    try:
        if not os.path.samestat(os.fstat(descriptor), _no_link(Path(path))):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _no_link(path: Path) -> os.stat_result:
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return status


def open_direct(path: Path) -> int:
    """Open a file on a local disk for direct writes; -1 if they would not be faster.

    All output has to be synced to disk in the end. Direct writes take no page cache from the
    inputs, need no copy, and hold no lock that other threads wait for.
    """
    if not hasattr(os, "O_DIRECT"):
        return -1
    device = path.stat().st_dev
    if not (_BLOCK_DEVICES / f"{os.major(device)}:{os.minor(device)}").exists():
        return -1
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError:
        return -1


def read_at(descriptor: int, position: int, out: memoryview) -> int:
    """Read from a file at a position, in any thread; return how many bytes were read."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [out], position)
    if hasattr(os, "pread"):
        data = os.pread(descriptor, len(out), position)
    else:
        with _SEEKING:
            os.lseek(descriptor, position, os.SEEK_SET)
            data = os.read(descriptor, min(len(out), 1 << 30))
    out[: len(data)] = data
    return len(data)


def write_at(descriptor: int, position: int, data: memoryview) -> int:
    """Write into a file at a position, in any thread; return how many bytes were written."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, position)
    with _SEEKING:
        os.lseek(descriptor, position, os.SEEK_SET)
        return os.write(descriptor, data[: 1 << 30])


def reserve(descriptor: int, num_bytes: int) -> None:
    """Set a file's size, and reserve its disk space if the system can."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, num_bytes)
    os.ftruncate(descriptor, num_bytes)


def reserved_bytes(status: os.stat_result) -> int:
    """Return the bytes of disk space that a file has."""
    return status.st_blocks * 512 if hasattr(status, "st_blocks") else status.st_size


def punch(descriptor: int, position: int, num_bytes: int) -> bool:
    """Give bytes of a file back to the disk, after which they are zeros; False if it cannot."""
    call = getattr(c_library(), "fallocate", None)
    if call is None:
        return False
    import ctypes

    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return bool(call(descriptor, _PUNCH_HOLE | _KEEP_SIZE, position, num_bytes) == 0)


def will_need(descriptor: int, position: int, num_bytes: int) -> None:
    """Ask the system to read bytes of a file into the page cache soon, if it can."""
    _advise(descriptor, position, num_bytes, "POSIX_FADV_WILLNEED")


def forget(descriptor: int, position: int, num_bytes: int) -> None:
    """Drop bytes of a file from the page cache, if the system can."""
    _advise(descriptor, position, num_bytes, "POSIX_FADV_DONTNEED")


def _advise(descriptor: int, position: int, num_bytes: int, name: str) -> None:
    advice: int | None = getattr(os, name, None)
    if advice is not None and hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # a later read reports what is wrong
            os.posix_fadvise(descriptor, position, num_bytes, advice)


def lock(descriptor: int) -> bool:
    """Lock an open file until it is closed; False where another process holds it.

    On a system without locks, the user must not let two processes write one output.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt is not None:
            os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True


def remove_open(path: Path, close: Callable[[], None]) -> None:
    """Remove an open file and close it; closes first if the system needs that."""
    try:
        path.unlink(missing_ok=True)
    except PermissionError:
        close()
        path.unlink(missing_ok=True)
    close()


def check_own(descriptor: int, path: Path) -> os.stat_result:
    """Return the status of an open file that only this program may write.

    Raises:
        OutlierMergeError: it is not a regular file, or has a second name (hard link).
    """
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        what = "has a second name (a hard link)" if status.st_nlink > 1 else "is no regular file"
        raise OutlierMergeError(f"{path}: {what}, so that it may not be ours. Remove it.")
    return status


def remove_files(folder: Path, names: set[str]) -> None:
    """Remove files of a folder by their relative names, and folders that become empty."""
    for name in sorted(files_in(folder)):
        if name in names:
            (folder / name).unlink()
    for inner in folders_in(folder):
        if not any(inner.iterdir()):
            inner.rmdir()


def folders_in(folder: Path) -> Iterator[Path]:
    """Yield all folders under a folder, and then itself; links are not followed."""
    with os.scandir(folder) as entries:
        inner = [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    for each in inner:
        yield from folders_in(each)
    yield folder


def sync_folder(path: Path) -> None:
    """Sync the names in a folder to disk, if the system can open folders."""
    if hasattr(os, "O_DIRECTORY"):
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except PermissionError:  # a folder may be writable but not readable
            os.sync()
            return
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
