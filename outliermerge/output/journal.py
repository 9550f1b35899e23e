"""The journal of an output: lines with checksums that say what is done, and a lock."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from outliermerge.errors import OutlierMergeError
from outliermerge.output.claims import Claim, ClaimedError
from outliermerge.output.names import journal_path, partial_folder
from outliermerge.storage.failures import failure
from outliermerge.storage.system import lock, open_to_append, remove_open

# The start of every journal. The number rises when older versions cannot read the format.
_BEGINNING, _ANY_BEGINNING = b'{"outliermerge journal": 2, ', b'{"outliermerge journal": '
_MOST_PARTS = 10**6
_MOST_BYTES = 256 << 20  # the journal of 46,000 tensors has about 20 MB


class BusyError(OutlierMergeError):
    """Another process holds an output, or a part of it.

    Attributes:
        is_beginning: it holds the output only for the moment in which it begins a part.
        is_part: it is a part that is held, not the whole output.
        holder: what it says of itself; may be empty.
    """

    def __init__(self, final: Path, holder: Mapping[str, Any], *, is_part: bool) -> None:
        super().__init__(
            f"{final}: another run{told(holder)} is writing it. Wait until it is done, stop it, "
            "or choose another output."
        )
        self.is_beginning, self.is_part = "part" in holder and not is_part, is_part
        self.holder = holder


class Journal:
    """A file beside an output that one process at a time can lock; each part has one.

    It exists from before the first byte of an output is written until the output has its final
    name. So files left by a killed run can be told from files of somebody else. Each line ends with
    the checksum of the rest of the line; a line that was cut or changed is ignored. On a disk that
    several machines may share, the lock is backed by a claim (`claims.py`).

    Attributes:
        path: the path of the file.
        lines: its entries, without the first line and without damaged lines.
        identity: the identity of the merge that began the output; None if none has.
    """

    def __init__(self, final: Path, part: str = "") -> None:
        """Open and lock the journal of an output or of a part; a missing one is made.

        Raises:
            BusyError: another process holds it.
            OutlierMergeError: the file is not a journal, or cannot be opened.
        """
        self.final, self.path = final, journal_path(final, part)
        self.identity: Mapping[str, Any] | None = None
        self.lines: list[dict[str, Any]] = []
        self._descriptor, self._claim = _locked(self.path, final)
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        if os.fstat(self._descriptor).st_size > _MOST_BYTES:
            raise OutlierMergeError(f"{self.path}: is too large for a journal. Move it away.")
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            file.seek(0)
            raw = file.read()
        if raw.startswith(_ANY_BEGINNING) and not raw.startswith(_BEGINNING[: len(raw)]):
            raise OutlierMergeError(
                f"{self.path}: is of another version of outliermerge. Go on with that version, or "
                f"remove it and {partial_folder(self.final)} to start over."
            )
        if not (raw.startswith(_BEGINNING) or _BEGINNING.startswith(raw)):
            raise OutlierMergeError(
                f"{self.path}: the journal of the merge would be written there, but it holds "
                "something else. Move it away or choose another output."
            )
        first, *others = raw.split(b"\n")
        entry = entry_of(first)
        if entry is None or not isinstance(entry.get("identity"), dict):
            return
        self.identity = entry["identity"]
        self.lines = [line for line in map(entry_of, others) if line is not None]
        if not raw.endswith(b"\n"):  # a line that a kill cut short must not join the next line
            self._write(b"\n")

    def begin(self, identity: Mapping[str, Any], **more: Any) -> None:
        """Start over, with the identity of a merge."""
        self.clear()
        self.identity = json.loads(json.dumps(identity))
        self._write(entry_line({"outliermerge journal": 2, "identity": self.identity}))
        self.add(more)

    def clear(self) -> None:
        """Remove all entries."""
        self._do(lambda: os.ftruncate(self._descriptor, 0))
        self.identity, self.lines = None, []

    def add(self, entry: Mapping[str, Any]) -> None:
        """Append an entry."""
        self.lines.append(json.loads(json.dumps(entry)))
        self._write(entry_line(entry))

    def last(self, key: str) -> Any:
        """Return the newest value of a key; None if no line has the key."""
        return next((line[key] for line in reversed(self.lines) if key in line), None)

    def all(self, key: str) -> list[Any]:
        """Return all values of a key, the oldest first."""
        return [line[key] for line in self.lines if key in line]

    def sync(self) -> None:
        """Sync all lines to disk."""
        self._do(lambda: os.fsync(self._descriptor))

    def remove(self) -> None:
        """Remove the file when everything is done, and release the lock."""
        self._do(lambda: remove_open(self.path, self._close))

    def close(self) -> None:
        """Release the lock; remove the journal if it has no entry."""
        if self._descriptor < 0:
            return
        if self.identity is None and os.fstat(self._descriptor).st_size == 0:
            remove_open(self.path, self._close)
        self._close()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)  # before the claim goes: then other machines see all lines
            self._descriptor = -1
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    def _write(self, data: bytes) -> None:
        def write() -> None:
            done = 0
            while done < len(data):
                done += os.write(self._descriptor, data[done:])

        self._do(write)

    def _do(self, action: Any) -> None:
        if self._claim is not None:
            self._claim.check()
        try:
            action()
        except OSError as error:
            raise failure(self.path, "written", error) from error


def entry_line(entry: Mapping[str, Any]) -> bytes:
    """Return the line of an entry, with its checksum."""
    text = json.dumps(entry).encode()
    return text + b"\t" + xxhash.xxh3_64_hexdigest(text).encode() + b"\n"


def entry_of(raw: bytes) -> dict[str, Any] | None:
    """Return the entry of a line; None if the line is damaged."""
    text, _, checksum = raw.rpartition(b"\t")
    if xxhash.xxh3_64_hexdigest(text).encode() != checksum:
        return None
    try:
        entry = json.loads(text)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and _is_fit(entry, text) else None


def _is_fit(entry: Mapping[str, Any], text: bytes) -> bool:
    """Tell whether an entry has the form that this version writes; other versions may differ."""
    if b"\\ud" in text:
        try:
            json.dumps(entry, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # a lone surrogate; no name that we write has one
            return False
    if "tensor" in entry and entry.keys() != _RESULT.keys():
        return False
    forms = _RESULT if "tensor" in entry else _FORMS
    return all(forms[key](value) for key, value in entry.items() if key in forms)


def _is_move(value: object) -> bool:
    """Tell whether a value is valid for `naming`: it may move only files in OUT.partial."""
    return (
        isinstance(value, dict)
        and value.keys() == {"source", "new", "old"}
        and isinstance(value["source"], str)
        and "/" not in value["source"]
        and value["source"] not in (".", "..")
        and type(value["new"]) is int
        and (value["old"] is None or type(value["old"]) is int)
    )


def _are(value: object, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(fits, value))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


_FORMS: dict[str, Callable[[Any], bool]] = {
    "shards": lambda value: _are(value, _is_text),
    "files": lambda value: _are(value, _is_text),
    "marks": lambda value: isinstance(value, dict),
    "process": lambda value: isinstance(value, dict),
    "folder": lambda value: type(value) is int,
    "equal": lambda value: _are(value, lambda number: type(number) is int),
    "num_parts": lambda value: type(value) is int and 0 < value < _MOST_PARTS,
    "naming": lambda value: bool(value) and _are(value, _is_move),
}
_RESULT: dict[str, Callable[[Any], bool]] = {
    "tensor": _is_text,
    "action": lambda value: value in ("copy", "merge"),
    "checksum": _is_text,
    "read": lambda value: (
        isinstance(value, dict)
        and all(key.isdecimal() and _is_text(sum_) for key, sum_ in value.items())
    ),
    "read_bytes": lambda value: type(value) is int and value >= 0,
    "statistics": lambda value: isinstance(value, dict),
    "non_finite": lambda value: _are(value, _is_text),
}


def _locked(path: Path, final: Path) -> tuple[int, Claim | None]:
    """Open and lock a journal, and claim it; open it again if the file was removed in between."""
    is_part = path != journal_path(final)
    while True:
        descriptor, claim = _opened(path), None
        try:
            if not lock(descriptor):
                raise BusyError(final, _holder(descriptor), is_part=is_part)
            claim = Claim.of(path)
            if claim is not None:  # what another machine has written since is seen anew
                os.close(descriptor)
                descriptor = _opened(path)
                if not lock(descriptor):
                    raise BusyError(final, _holder(descriptor), is_part=is_part)
            if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                return descriptor, claim
        except FileNotFoundError:
            pass
        except BaseException as error:
            holder = _holder(descriptor) if isinstance(error, ClaimedError) else {}
            os.close(descriptor)
            if claim is not None:
                claim.release()
            if isinstance(error, ClaimedError):
                raise BusyError(final, holder or error.holder, is_part=is_part) from None
            if isinstance(error, OSError):
                raise failure(path, "locked", error) from error
            raise
        os.close(descriptor)
        if claim is not None:
            claim.release()


def _opened(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        there = next(folder for folder in path.parents if folder.exists())
        what = f"cannot be made: {error.strerror}" if there.is_dir() else f"{there} is no folder"
        raise OutlierMergeError(f"{path.parent}: {what}. Choose another output.") from error
    try:
        descriptor = open_to_append(path)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise failure(path, "made", error) from error
        raise OutlierMergeError(
            f"{path}: is a link, a folder or a socket. Choose another output."
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OutlierMergeError(f"{path}: is no regular file. Move it away.")
    return descriptor


def parts(final: Path) -> list[str]:
    """Return the parts of an output that have a journal, such as `2-of-3`."""
    beginning = journal_path(final).name + "."
    names = [path.name for path in final.absolute().parent.iterdir()]
    ends = [name.removeprefix(beginning) for name in names if name.startswith(beginning)]
    return sorted(part for part in ends if re.fullmatch(r"\d+-of-\d+", part))


def remove_parts(final: Path) -> None:
    """Remove the journals of parts; the caller holds the output's own journal.

    Raises:
        BusyError: another process is writing one.
    """
    for part in parts(final):
        Journal(final, part).remove()


def process(part: str = "") -> dict[str, Any]:
    """Return the description of this process that its journal shows to people."""
    of_part = {"part": part} if part else {}
    return {"pid": os.getpid(), "host": socket.gethostname(), "began": int(time.time())} | of_part


def _holder(descriptor: int) -> dict[str, Any]:
    """Return the description of the process that holds a journal; may be empty."""
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        raw = file.read(_MOST_BYTES)
    known = [e["process"] for e in map(entry_of, raw.split(b"\n")) if e and "process" in e]
    return known[-1] if known else {}


def told(holder: Mapping[str, Any]) -> str:
    """Return a phrase for messages on who holds a journal."""
    try:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["began"]))
        part = f" of part {holder['part']}" if "part" in holder else ""
        return f"{part} (process {holder['pid']} on {holder['host']}, since {began})"
    except (KeyError, TypeError, ValueError, OverflowError):
        return ""
