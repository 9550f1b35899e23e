"""What systems do with files in ways of their own, each with a plain fallback.

Here, and in `machine` for what is no file, stands all that not every system has: whether a
function is there is asked of it, never which system this is. Files are opened so that nothing
hangs, written only where nothing is, and their names change hands at once.
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
# Else some systems change the ends of lines.
_BYTES = getattr(os, "O_BINARY", 0)
_AT_ONCE = getattr(os, "O_NONBLOCK", 0)
# Where one byte is locked that no journal reaches: a lock of msvcrt keeps others from reading it.
_LOCKED_BYTE = 1 << 40
_SEEKING = threading.Lock()
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


def refuse_special(path: Path, mode: int) -> None:
    """Raise OutlierMergeError unless a path leads to a regular file."""
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise OutlierMergeError(f"{path}: is {what}, expected a regular file")


@contextmanager
def knowing(path: Path) -> Iterator[None]:
    """Have failures of calls on a descriptor, which do not know their file, name it."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def open_regular(path: Path) -> int:
    """Return the descriptor of a regular file, opened for reading.

    A pipe or a device is refused without waiting for what it gives.

    Raises:
        OSError: it cannot be opened.
        OutlierMergeError: it is no regular file.
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
    """Open a file to read it and to write at its end, made where it is missing.

    Raises:
        OSError: it cannot be opened; ELOOP or EISDIR where it is a link or a folder.
    """
    return _open_no_link(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)


def open_inside(folder: Path, name: str) -> int:
    """Open a file of a folder, to read and write, by its name in it, no part of which is a link.

    Raises:
        OSError: it cannot be opened; ELOOP or ENOTDIR where a part is a link.
    """
    with _home(folder, name) as (home, last):
        return _open_no_link(last, os.O_RDWR, home)


def make_inside(folder: Path, name: str) -> int:
    """Make a file of a folder, and the folders in its name; what had the name is removed.

    Raises:
        OSError: it cannot be made; ELOOP or ENOTDIR where a folder in the name is a link.
    """
    with _home(folder, name) as (home, last):
        with suppress(FileNotFoundError):
            os.unlink(last, dir_fd=home)
        return os.open(last, os.O_RDWR | os.O_CREAT | os.O_EXCL | _BYTES, 0o644, dir_fd=home)


@contextmanager
def _home(folder: Path, name: str) -> Iterator[tuple[int | None, str]]:
    """Open the folder that a file is in, made where it is missing; no part of it is a link.

    Yields:
        The folder's descriptor and the file's name in it; None and its path where the system
        opens nothing by a folder: then the parts are looked at, one after the other.
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
    """Open what is no link; where the system cannot say so, it is looked at before and after."""
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
    """Open a file on a local disk for writing past the page cache; -1 where that does not pay.

    What is synced at the end has to reach the disk anyway: writing it there at once takes no
    memory from the inputs, no copy, and no lock that the other threads wait for.
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
    """Read from a file at a position, by any number of threads; return how many bytes came."""
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
    """Write into a file at a position, by any number of threads; return how many bytes went."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, position)
    with _SEEKING:
        os.lseek(descriptor, position, os.SEEK_SET)
        return os.write(descriptor, data[: 1 << 30])


def reserve(descriptor: int, num_bytes: int) -> None:
    """Give a file its size, and its room on the disk where the system can."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, num_bytes)
    os.ftruncate(descriptor, num_bytes)


def reserved_bytes(status: os.stat_result) -> int:
    """Return the room that a file has on the disk."""
    return status.st_blocks * 512 if hasattr(status, "st_blocks") else status.st_size


def will_need(descriptor: int, position: int, num_bytes: int) -> None:
    """Have bytes of a file read from the disk soon, where the system can."""
    _advise(descriptor, position, num_bytes, "POSIX_FADV_WILLNEED")


def forget(descriptor: int, position: int, num_bytes: int) -> None:
    """Give up the room that bytes of a file take in the page cache, where the system can."""
    _advise(descriptor, position, num_bytes, "POSIX_FADV_DONTNEED")


def _advise(descriptor: int, position: int, num_bytes: int, name: str) -> None:
    advice: int | None = getattr(os, name, None)
    if advice is not None and hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # reading it says what is wrong
            os.posix_fadvise(descriptor, position, num_bytes, advice)


def lock(descriptor: int) -> bool:
    """Lock an open file until it is closed; False where another process holds it.

    A system that can lock nothing leaves it to people that no two processes write one output.

    Raises:
        OSError: the file system gives no locks.
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
    """Remove a file that is open, and close it; before, where no open file can be removed."""
    try:
        path.unlink(missing_ok=True)
    except PermissionError:
        close()
        path.unlink(missing_ok=True)
    close()


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


def sync_folder(path: Path) -> None:
    """Have the names in a folder reach the disk, where the system opens folders."""
    if hasattr(os, "O_DIRECTORY"):
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except PermissionError:  # one may write in it, and not list it
            os.sync()
            return
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
