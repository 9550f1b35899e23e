"""Writes an adapter's folder: tensors as they come, then the header, the config and the report."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

import xxhash

from outliermerge.checkpoint.adapters.config import CONFIG_NAME, FILE_NAMES
from outliermerge.checkpoint.folders.beside import CARD_NAME
from outliermerge.checkpoint.sources import DType
from outliermerge.errors import OutlierMergeError, argument, shown
from outliermerge.extraction.report import REPORT_NAME
from outliermerge.output.folder import differing
from outliermerge.output.journal import Journal, process
from outliermerge.output.names import journal_path, partial_folder, real_output
from outliermerge.output.writer import write_beside
from outliermerge.storage.failures import naming
from outliermerge.storage.stamps import Watched, open_file, watching
from outliermerge.storage.system import inode, make_inside, move_new, open_inside, sync_folder

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_NAME = FILE_NAMES[0]
_NAMES = (WEIGHTS_NAME, CONFIG_NAME, REPORT_NAME, CARD_NAME)
_MADE = "an adapter"
_DIGITS = 15  # of a position in a file
_ENTRY_BYTES = 130 + 2 * _DIGITS  # of a header, without the tensor's name


class AdapterFolder:
    """A folder in the making. It has its name when `finish` returns; until then NAME.partial.

    Tensors are added in steps. A journal beside the folder is locked by the process that makes it,
    and has a line for each step that is done, so that a killed or stopped process is gone on from:
    steps whose bytes are still those that were written are taken over. What an error leaves
    without a finished step is removed.

    Attributes:
        done: by step what `record` was given, of the steps that were taken over.

    Args:
        output: its name.
        names: what may be written, which the header needs room for.
        identity: the facts that must be equal to go on, in the user's words.
        marks: identify the inputs' files; if they are others, everything is made anew.
        fresh: start over.

    Raises:
        BusyError: another process makes it.
        OutlierMergeError: something has the name, or what is unfinished there is something else.
    """

    def __init__(
        self,
        output: Path,
        names: list[str],
        *,
        identity: Mapping[str, Any],
        marks: Mapping[str, list[int]],
        fresh: bool = False,
    ) -> None:
        self.final = real_output(output)
        self.folder = partial_folder(self.final)
        if not os.path.lexists(journal_path(self.final)):
            refuse_taken(self.final)
        room = 64 + sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names)
        self._room = -(-room // 8) * 8
        self._entries: dict[str, Any] = {}
        self._end, self._is_kept = 0, True
        self._digest, self._step = xxhash.xxh3_128(), dict[str, Any]()
        self.done: dict[str, Any] = {}
        self._journal = Journal(self.final)
        try:
            self._begin({"what is made": _MADE, **identity}, marks, fresh=fresh)
        except BaseException:
            self._journal.close()
            raise

    def _begin(
        self, identity: Mapping[str, Any], marks: Mapping[str, list[int]], *, fresh: bool
    ) -> None:
        """Take over what a killed run has left, or remove it and make the folder."""
        began = self._journal.identity
        if began is not None and began.get("what is made") != _MADE:
            raise OutlierMergeError(
                f"{self.folder}: was begun by a merge, which goes on by its own command. Choose "
                f"another output, or remove it and {self._journal.path}."
            )
        if os.path.lexists(self.final):
            if began is not None:  # killed when it had its name
                self._journal.remove()
            refuse_taken(self.final)
        files = {name for names in self._journal.all("files") for name in names}
        _refuse_others(self.folder, {*_NAMES, *files})
        if not fresh and self._take_over(marks):
            if changed := differing(began, identity):
                raise OutlierMergeError(
                    f"{self.folder}: was begun by another extraction: {', '.join(changed)} changed "
                    f"since. Use {argument('fresh', True)} to start over."
                )
            self._journal.add({"process": process()})
            open_weights = open_inside
        else:
            self.done, open_weights = {}, make_inside
            with naming(self.folder, "removed"):
                if os.path.lexists(self.folder):
                    shutil.rmtree(self.folder)
            self._journal.begin(identity, process=process(), marks=marks)
            with naming(self.folder, "made"):
                self.folder.mkdir()
            self._journal.add({"folder": inode(self.folder)})
            self._journal.sync()  # then even after a power cut the folder is known as ours
        with naming(self.folder / WEIGHTS_NAME, "written"):
            self._file = os.fdopen(open_weights(self.folder, WEIGHTS_NAME), "wb")
            os.ftruncate(self._file.fileno(), 8 + self._room + self._end)
            self._file.seek(8 + self._room + self._end)

    def _take_over(self, marks: Mapping[str, list[int]]) -> bool:
        """Take over the steps whose bytes are as they were written; tell whether any has some."""
        path, journal = self.folder / WEIGHTS_NAME, self._journal
        if journal.last("marks") != marks or inode(self.folder) not in journal.all("folder"):
            return False
        if inode(path) is None:
            return False
        with watching(Watched()), naming(path, "read"), open_file(path) as file:
            file.seek(8 + self._room)
            for line in journal.lines:
                if not isinstance(line.get("step"), str):
                    continue
                if line["checksum"] != _checksum(file, line["num_bytes"]):
                    break
                self.done[line["step"]] = line["facts"]
                self._entries |= line["tensors"]
                self._end += line["num_bytes"]
        return bool(self._end)

    def has(self, name: str) -> bool:
        """Tell whether a tensor is written."""
        return name in self._entries

    def add(
        self, name: str, dtype: DType, shape: tuple[int, ...], blocks: Iterable[Tensor]
    ) -> None:
        """Write a tensor, given in blocks one after the other."""
        import torch

        start = self._end
        with naming(self.folder / WEIGHTS_NAME, "written"):
            for block in blocks:
                data: Any = block.contiguous().cpu().view(-1).view(torch.uint8).numpy()
                self._file.write(memoryview(data))
                self._digest.update(memoryview(data))
                self._end += data.nbytes
        entry = {"dtype": dtype.code, "shape": list(shape), "data_offsets": [start, self._end]}
        self._entries[name] = self._step[name] = entry

    def record(self, step: str, facts: Any) -> None:
        """Note in the journal that a step is done: the tensors since the last one, and facts."""
        with naming(self.folder / WEIGHTS_NAME, "written"):
            self._file.flush()
        self._journal.add({
            "step": step,
            "tensors": self._step,
            "num_bytes": sum(self.bytes_of(name) for name in self._step),
            "checksum": self._digest.hexdigest(),
            "facts": facts,
        })  # fmt: skip
        self._digest, self._step = xxhash.xxh3_128(), {}

    def bytes_of(self, name: str) -> int:
        """Return the bytes of a tensor that is written."""
        start, stop = self._entries[name]["data_offsets"]
        return int(stop - start)

    @property
    def num_bytes(self) -> int:
        """The bytes of the tensors so far."""
        return self._end

    def forget(self) -> None:
        """Have what is unfinished removed at the end: it may be of two states of an input."""
        self._is_kept = False

    def close_weights(self, config: Mapping[str, Any]) -> None:
        """Write the header and the config, so that the folder can be read."""
        entries = {"__metadata__": {"format": "pt"}, **self._entries}
        header = json.dumps(entries, separators=(",", ":")).encode()
        assert len(header) <= self._room
        with naming(self.folder / WEIGHTS_NAME, "written"):
            self._file.seek(0)
            self._file.write(struct.pack("<Q", self._room) + header.ljust(self._room))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        write_beside(self.folder, {CONFIG_NAME: _json(config)})

    def finish(self, report: Mapping[str, Any], card: str, others: Mapping[str, Path]) -> None:
        """Write the report, the card and copies of further files, and give the folder its name."""
        self._journal.add({"files": [*others]})
        write_beside(self.folder, {REPORT_NAME: _json(report), CARD_NAME: card.encode(), **others})
        refuse_taken(self.final)
        with naming(self.final, "written"):
            sync_folder(self.folder)
            move_new(self.folder, self.final)
            sync_folder(self.final.parent)
        self._journal.remove()

    def __enter__(self) -> AdapterFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError, OutlierMergeError):  # the next run removes what stays
            if error is not None:
                self._file.close()
            if error is not None and not (self._is_kept and self._end):
                shutil.rmtree(self.folder)
                self._journal.remove()
        self._journal.close()


def refuse_taken(output: Path) -> None:
    """Refuse a name that something has.

    Raises:
        OutlierMergeError: something has it.
    """
    if os.path.lexists(output):
        raise OutlierMergeError(f"{output}: exists already. Name another folder, or remove it.")


def _refuse_others(folder: Path, known: set[str]) -> None:
    """Refuse a folder with other things than a killed run leaves."""
    if not os.path.lexists(folder):
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if others := sorted(names - known):
        raise OutlierMergeError(
            f"{folder}: is there, and has {shown(others[0])}, which no unfinished adapter has. "
            "Move it away."
        )


def _checksum(file: BinaryIO, num_bytes: int) -> str | None:
    """Return the checksum of the next bytes of a file; None if it has not so many."""
    digest = xxhash.xxh3_128()
    while num_bytes and (block := file.read(min(num_bytes, 1 << 20))):
        digest.update(block)
        num_bytes -= len(block)
    return digest.hexdigest() if not num_bytes else None


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode()
