"""Opens input files without hanging, and stamps them, so that changes are noticed.

A plan keeps the stamps of all files that it read. A file is first opened and then examined, so that
it cannot be replaced in between.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any

from outliermerge.errors import OutlierMergeError
from outliermerge.storage.stand_ins import true_size
from outliermerge.storage.system import knowing, open_regular

# Linux takes times from a clock that ticks every 1 to 10 ms: a file written in the current tick can
# be written again and keep the same time.
_TICK_NS = 20_000_000
_ADVICE = (
    "Nothing took the output's name. Run the same command again when no program writes to the "
    "models any more."
)


class ChangedInputError(OutlierMergeError):
    """An input has changed since the plan was made."""


class OtherBytesError(ChangedInputError):
    """A second reading gave other bytes: tensors made so far may mix two states of the input."""


@dataclass(frozen=True, slots=True)
class FileStamp:
    """The facts that show whether a file is still the one that the plan read.

    Attributes:
        device, inode: which file it is.
        num_bytes: its size.
        mtime_ns: the time of the last write, which programs can set.
        ctime_ns: the time of the last change of anything, which programs cannot set.
    """

    path: Path
    num_bytes: int
    mtime_ns: int
    device: int
    inode: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path) -> FileStamp:
        """Return the stamp of the file at a path; the current watch notes it."""
        stamp = cls.of_status(path, path.stat())
        if (watched := _WATCHED.get()) is not None:
            watched.note(path, stamp)
        return stamp

    @classmethod
    def of_status(cls, path: Path, status: os.stat_result) -> FileStamp:
        """Return the stamp of a file from the result of stat or fstat."""
        return cls(
            path=path,
            num_bytes=true_size(path, status.st_size),
            mtime_ns=status.st_mtime_ns,
            device=status.st_dev,
            inode=status.st_ino,
            ctime_ns=status.st_ctime_ns,
        )


class Watched:
    """Files with their stamps: the files that a plan reads, and that a run must find unchanged.

    Args:
        stamps: the stamps of a plan; None for a file that did not exist. Files read later are
            added.

    Raises:
        ChangedInputError: two stamps of one file differ.
    """

    def __init__(self, stamps: Iterable[tuple[Path, FileStamp | None]] = ()) -> None:
        self._stamps: dict[Path, FileStamp | None] = {}
        self._is_planned = False
        for path, stamp in stamps:
            self.note(path, stamp)
            self._is_planned = True

    @property
    def stamps(self) -> tuple[tuple[Path, FileStamp | None], ...]:
        return tuple(self._stamps.items())

    def note(self, path: Path, stamp: FileStamp | None) -> None:
        """Note a file that is read, or that does not exist.

        Raises:
            ChangedInputError: the file has changed.
        """
        before = self._stamps.setdefault(path, stamp)
        if before is None and not self._is_planned:  # the plan itself has fetched it since
            self._stamps[path] = stamp
        elif before != stamp:
            raise _changed(path, before, stamp)

    def check(self, paths: Iterable[Path] | None = None) -> None:
        """Raise ChangedInputError if some of the given files, or of all files, have changed."""
        for path in self._stamps if paths is None else paths:
            if path in self._stamps:
                self.note(path, _found(path))


_WATCHED: ContextVar[Watched | None] = ContextVar("_WATCHED", default=None)


def current_watch() -> Watched | None:
    """Return this thread's watch, so that other threads can note their files in it."""
    return _WATCHED.get()


@contextmanager
def watching(watched: Watched) -> Iterator[Watched]:
    """Have every input that this thread opens noted."""
    token = _WATCHED.set(watched)
    try:
        yield watched
    finally:
        _WATCHED.reset(token)


def open_input(path: Path, watched: Watched | None = None) -> int:
    """Return the descriptor of a regular file, opened for reading.

    A pipe or a device is refused without waiting for its data.

    Args:
        watched: the watch that notes the file; by default this thread's.

    Raises:
        OSError: it cannot be opened.
        OutlierMergeError: it is not a regular file, or not the file that the plan read.
    """
    descriptor = open_regular(path)
    try:
        if (watched := watched or _WATCHED.get()) is not None:
            with knowing(path):
                watched.note(path, _settled(path, lambda: os.fstat(descriptor)))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_file(path: Path) -> BufferedReader:
    """Return a regular file, opened like `open_input`; errors inside the `with` block name it."""
    return _InputFile(path)


class _InputFile(BufferedReader):
    def __init__(self, path: Path) -> None:
        descriptor = open_input(path)
        try:
            with knowing(path):
                super().__init__(FileIO(descriptor))
        except BaseException:
            with suppress(OSError):  # FileIO may have closed it
                os.close(descriptor)
            raise
        self._path = path

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        with knowing(self._path):
            if isinstance(exception[1], OSError):
                raise exception[1]


def same_bytes(path: Path, other: Path) -> bool:
    """Tell whether two files hold the same bytes.

    Raises:
        OutlierMergeError: one cannot be read.
    """
    try:
        with open_file(path) as ours, open_file(other) as theirs:
            while (block := ours.read(1 << 20)) == theirs.read(1 << 20):
                if not block:
                    return True
            return False
    except OSError as error:
        raise OutlierMergeError(
            f"{error.filename or path}: cannot be read: {_reason(error)}"
        ) from error


def is_there(path: Path) -> bool:
    """Tell whether a path exists, even if it cannot be read.

    Raises:
        OutlierMergeError: the system does not tell.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        note_absent(path)
        return False
    except (OSError, ValueError) as error:
        raise OutlierMergeError(f"{path}: cannot be read: {_reason(error)}") from error
    return True


def note_absent(path: Path) -> None:
    """Note in the current watch that a file does not exist."""
    if (watched := _WATCHED.get()) is not None:
        watched.note(path, None)


@contextmanager
def told_by_name() -> Iterator[None]:
    """Turn errors of the file system inside the block into an error that names the file.

    Raises:
        OutlierMergeError: with the message for the original error.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise OutlierMergeError(f"{error.filename}: cannot be read: {_reason(error)}") from error
    except RuntimeError as error:  # from Path.resolve before Python 3.13
        if not str(error).startswith("Symlink loop"):
            raise
        raise OutlierMergeError(f"cannot be read: {error}") from error


def refuse_text(path: Path) -> None:
    """Raise OutlierMergeError if a path is not valid UTF-8, which a manifest needs."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as error:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise OutlierMergeError(
            f"{shown}: its name is not UTF-8, so that no manifest could name it. Rename it."
        ) from error


def _found(path: Path) -> FileStamp | None:
    try:
        return FileStamp.of_status(path, path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ChangedInputError(
            f"{path}: cannot be read any more: {error.strerror}. {_ADVICE}"
        ) from error


def _settled(path: Path, ask: Callable[[], os.stat_result]) -> FileStamp:
    """Return a stamp, after waiting until any later change would give another one."""
    status = ask()
    age_ns = time.time_ns() - status.st_ctime_ns
    if 0 <= age_ns < _TICK_NS:
        time.sleep((_TICK_NS - age_ns) / 1e9)
        status = ask()
    return FileStamp.of_status(path, status)


def _changed(path: Path, before: FileStamp | None, after: FileStamp | None) -> ChangedInputError:
    if before is None:
        what = "has appeared"
    elif after is None:
        what = "was removed"
    elif (before.device, before.inode) != (after.device, after.inode):
        what = "was replaced by another file"
    elif before.num_bytes != after.num_bytes:
        what = f"its size changed from {before.num_bytes:,} to {after.num_bytes:,} bytes"
    elif before.mtime_ns != after.mtime_ns:
        what = "was written to"
    else:
        what = "was changed, its old time put back, or its name, owner or rights were changed"
    return ChangedInputError(f"{path}: {what} since the merge was planned. {_ADVICE}")


def other_bytes(paths: Iterable[Path], tensor: str) -> OtherBytesError:
    """Return the error for a second reading of a tensor that gives other bytes."""
    files = " or ".join(map(str, paths))
    return OtherBytesError(
        f"{files}: tensor {tensor!r}: was written to during the merge: a second reading gave "
        f"other bytes than the first. {_ADVICE}"
    )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
