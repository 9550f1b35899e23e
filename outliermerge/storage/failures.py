"""Messages for files that cannot be read or written: which file, why, and what to do."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from outliermerge.errors import OutlierMergeError, argument

_ADVICE = {
    errno.EIO: "The disk, or what connects it, fails: the system's log (dmesg) says more. Copy "
    "what can still be read to another disk.",
    errno.EDQUOT: "Your quota on that disk is used up: remove something of yours there, or choose "
    "another disk.",
    errno.ESTALE: "The network file system has lost the file: it was replaced, or its server was "
    "started again. Give the command again.",
    errno.EACCES: "You have no right to it: ask its owner, or change its permissions.",
    errno.EPERM: "You have no right to it: ask its owner, or change its permissions.",
    errno.EROFS: "That disk can only be read: choose another.",
    errno.ENOENT: "It was found before, so something has removed or renamed it since, or its disk "
    "is gone. Put it back, and give the same command again.",
    errno.ENOMEM: f"Memory is short: give a smaller {argument('memory')} or fewer "
    f"{argument('threads')}.",
    errno.EMFILE: "Too many files are open: raise the limit (ulimit -n).",
    errno.ENFILE: "Too many files are open on this machine: end other programs.",
    errno.EFBIG: "That file system, or a limit (ulimit -f), allows no file of that size: choose "
    f"another disk, raise the limit, or give a smaller {argument('shard_size')}.",
    errno.ENOLCK: "That file system gives no locks: choose another disk.",
    errno.ENOSYS: "That file system cannot do this: choose another disk.",
    errno.EOPNOTSUPP: "That file system cannot do this: choose another disk.",
    errno.ETIMEDOUT: "The network file system does not answer: give the command again later.",
    errno.EHOSTDOWN: "The network file system does not answer: give the command again later.",
    errno.ENODEV: "The disk is gone: was it taken out?",
    errno.ENXIO: "The disk is gone: was it taken out?",
    errno.ELOOP: "It is a link where none is followed, or one that leads to itself: remove it.",
    errno.ENAMETOOLONG: "That file system takes no names of that length: choose a shorter one.",
}


def failure(
    path: Path, what: str, error: OSError | EOFError, *, tensor: str = "", needed_bytes: int = 0
) -> OutlierMergeError:
    """Return the message for a system call that failed.

    Args:
        path: the file of the call.
        what: what could not be done, such as `read` or `written`.
        tensor: the name of the tensor that was to be read or written.
        needed_bytes: how many bytes are still to be written, if known.

    >>> print(failure(Path("a"), "locked", OSError(errno.ENOLCK, "No locks available")))
    a: cannot be locked: No locks available (ENOLCK). That file system gives no locks: choose \
another disk.
    """
    where = f"{path}: tensor {tensor!r}" if tensor else str(path)
    number = getattr(error, "errno", None)
    if isinstance(error, EOFError) or number is None:
        reason = str(error.args[0] if error.args else error) or "the file ends early"
    else:
        reason = f"{os.strerror(number)} ({errno.errorcode.get(number, number)})"
    advice = _no_room(path, needed_bytes) if number == errno.ENOSPC else _ADVICE.get(number or 0)
    if number == errno.ENOENT and what in ("made", "written"):
        advice = f"Nothing can be made in {path.parent}: choose another place."
        if not path.parent.is_dir():
            advice = f"There is no folder {path.parent}: make it, or choose another place."
    if isinstance(error, EOFError):
        advice = "It has become shorter: was it changed, or not copied as a whole?"
    return OutlierMergeError(f"{where}: cannot be {what}: {reason}. {advice or ''}".rstrip(" "))


def _no_room(path: Path, needed_bytes: int) -> str:
    needed = f", {needed_bytes:,} are needed" if needed_bytes else ""
    there = next((place for place in (path, *path.absolute().parents) if place.exists()), None)
    with suppress(OSError):
        if there is not None:
            free = shutil.disk_usage(there).free
            return f"The disk has {free:,} bytes free{needed}: make room there."
    return f"The disk is full{needed}: make room there."


@contextmanager
def naming(path: Path, what: str, *, tensor: str = "", needed_bytes: int = 0) -> Iterator[None]:
    """Name the file in errors of calls on a descriptor, which do not know the name.

    Raises:
        OutlierMergeError: instead of OSError and EOFError.
    """
    try:
        yield
    except (OSError, EOFError) as error:
        raise failure(path, what, error, tensor=tensor, needed_bytes=needed_bytes) from error
