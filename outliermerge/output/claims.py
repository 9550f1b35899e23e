"""Claims: files that say which process works on an output, where locks may not be enough.

On a disk that several machines share, a lock may be known to one machine only (NFS mounted with
`local_lock`, BeeGFS, some mounts of Lustre), and no program can ask whether it is. Such a lock is
backed by a file beside the locked one. It is made by O_EXCL, which all machines see, and its owner
renews its time every few seconds. One that is not renewed any more is of a process or a machine
that has ended, and the next process takes it over.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from outliermerge.checkpoint.reader import write_exactly
from outliermerge.errors import OutlierMergeError, shown
from outliermerge.storage.failures import failure

# Attributes of files may reach another machine some seconds late.
RENEWED_SECONDS, STALE_SECONDS = 5.0, 45.0
_POLL_SECONDS = 0.2
_MOUNTS, _BOOT = Path("/proc/self/mountinfo"), Path("/proc/sys/kernel/random/boot_id")
# File systems of one machine. All others may be shared.
_OWN = frozenset(
    "apfs bcachefs btrfs ext2 ext3 ext4 exfat f2fs fuseblk hfsplus jfs ntfs ntfs3 overlay ramfs "
    "reiserfs tmpfs vfat xfs zfs".split()
)
_MAX_BYTES = 10_000
_logger = logging.getLogger(__name__)


class ClaimedError(Exception):
    """Another process has claimed a file, and works on.

    Attributes:
        holder: what it says of itself.
    """

    def __init__(self, holder: dict[str, Any]) -> None:
        super().__init__(holder)
        self.holder = holder


class Claim:
    """The claim to a locked file. It is renewed by a thread until it is released.

    Attributes:
        is_lost: another process has taken it over, as this one did not renew it for too long.
    """

    def __init__(self, path: Path, token: str) -> None:
        self._path, self._token, self.is_lost = path, token, False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    @staticmethod
    def of(locked: Path) -> Claim | None:
        """Claim a file that this process has locked; None where the disk is this machine's own.

        Raises:
            ClaimedError: another process has claimed it, and renews its claim.
            OSError: the claim cannot be made.
        """
        if is_own_disk(locked.parent):
            return None
        path, token = locked.with_name(locked.name + ".claim"), uuid4().hex
        while True:
            with suppress(FileExistsError):
                _make(path, token)
                return Claim(path, token)
            found = _read(path)
            if found is None:
                continue
            holder, _ = found
            # The lock is known to all processes of this machine: its owner here has ended.
            if holder.get("machine") == machine():
                _remove(path, holder.get("token"))
            elif _is_stale(path, found) and _take(path, token, holder.get("token")):
                return Claim(path, token)

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED_SECONDS):
            with suppress(OSError):  # it is tried again soon
                found = _read(self._path)
                if found is None or found[0].get("token") != self._token:
                    self.is_lost = True
                    return
                os.utime(self._path)

    def check(self) -> None:
        """Raise OutlierMergeError if the claim is lost."""
        if self.is_lost:
            raise OutlierMergeError(
                f"{self._path}: another process has taken over what this one was writing, since "
                f"this one did not renew its claim for {STALE_SECONDS:.0f} s (it was stopped, or "
                "cut off from the disk)"
            )

    def release(self) -> None:
        """Give the claim up.

        Raises:
            OutlierMergeError: its file cannot be removed. Who comes next does that.
        """
        self._ended.set()
        self._thread.join()
        if self.is_lost:
            return
        try:
            with suppress(FileNotFoundError):
                _remove(self._path, self._token)
        except OSError as error:
            raise failure(self._path, "removed", error) from error


def is_own_disk(folder: Path) -> bool:
    """Tell whether a folder is on a disk that only this machine uses, as far as is known."""
    try:
        lines = _MOUNTS.read_text("utf-8", "replace").splitlines()
    except OSError:
        return False
    place, found, length = os.path.realpath(folder), "", -1
    for line in lines:
        mount, _, rest = line.partition(" - ")
        if not rest or len(fields := mount.split()) < 5:
            continue
        point = fields[4].replace("\\040", " ").rstrip("/")
        if (place == point or place.startswith(f"{point}/")) and len(point) >= length:
            found, length = rest.split()[0], len(point)
    return found in _OWN


def machine() -> str:
    """Return what tells this machine, since it was started, from all others."""
    with suppress(OSError):
        return _BOOT.read_text().strip()
    return socket.gethostname()


def _make(path: Path, token: str, flags: int = os.O_CREAT | os.O_EXCL) -> None:
    said = {"pid": os.getpid(), "host": socket.gethostname(), "began": int(time.time())}
    text = json.dumps(said | {"machine": machine(), "token": token}).encode()
    descriptor = os.open(path, os.O_WRONLY | flags, 0o644)
    try:
        write_exactly(descriptor, 0, memoryview(text))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take(path: Path, token: str, stale: str | None) -> bool:
    """Take a stale claim over; of several that do so at once, the last one to write has it.

    Each waits before it looks who that was, for longer than another takes from its last look at the
    stale claim to its own writing (Fischer's algorithm).
    """
    found = _read(path)
    if found is None or found[0].get("token") != stale:
        return False
    _make(path, token, os.O_TRUNC)
    time.sleep(RENEWED_SECONDS)
    found = _read(path)
    return found is not None and found[0].get("token") == token


def _read(path: Path) -> tuple[dict[str, Any], int] | None:
    """Return what a claim says, and the time of its renewal; None if there is none."""
    try:
        with path.open("rb") as file:  # opening asks the disk's server for the newest state
            renewed_ns, raw = os.fstat(file.fileno()).st_mtime_ns, file.read(_MAX_BYTES)
    except FileNotFoundError:
        return None
    try:
        said = json.loads(raw)
    except (ValueError, RecursionError):  # it is being written, or nobody knows what it is
        said = None
    return (said if isinstance(said, dict) else {}), renewed_ns


def _is_stale(path: Path, found: tuple[dict[str, Any], int]) -> bool:
    """Wait and see whether a claim is renewed; False if it is released.

    Raises:
        ClaimedError: it is renewed.
    """
    began, is_said, holder = time.monotonic(), False, found[0]
    while (waited := time.monotonic() - began) < STALE_SECONDS:
        time.sleep(_POLL_SECONDS)
        now = _read(path)
        if now is None or now[0].get("token") != holder.get("token"):
            return False
        if now != found:
            raise ClaimedError(holder)
        if waited > RENEWED_SECONDS and not is_said:
            is_said = True
            _logger.warning(
                "%s: of process %s on %s, which may have ended: this is known in %.0f s",
                *(path, shown(holder.get("pid")), shown(holder.get("host"))),
                STALE_SECONDS - waited,
            )
    return True


def _remove(path: Path, token: str | None) -> None:
    """Remove a claim, if it is still the one with a token."""
    found = _read(path)
    if found is not None and found[0].get("token") == token:
        path.unlink(missing_ok=True)
