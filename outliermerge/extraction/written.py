"""Writes an adapter's folder: tensors as they come, then the header, the config and the report."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from outliermerge.checkpoint.adapters.config import CONFIG_NAME, FILE_NAMES
from outliermerge.checkpoint.sources import DType
from outliermerge.errors import OutlierMergeError, shown
from outliermerge.output.journal import Journal, process
from outliermerge.output.names import journal_path, partial_folder, real_output
from outliermerge.output.writer import write_beside
from outliermerge.storage.failures import naming
from outliermerge.storage.system import move_new, sync_folder

if TYPE_CHECKING:
    from torch import Tensor

REPORT_NAME = "extraction.json"
WEIGHTS_NAME = FILE_NAMES[0]
_NAMES = (WEIGHTS_NAME, CONFIG_NAME, REPORT_NAME)
_IDENTITY = {"what is made": "an adapter"}  # of its journal
_DIGITS = 15  # of a position in a file
_ENTRY_BYTES = 130 + 2 * _DIGITS  # of a header, without the tensor's name


class AdapterFolder:
    """A folder in the making. It has its name when `finish` returns; until then NAME.partial.

    A journal beside it is locked by the process that makes it, and tells what a killed one has
    left, which is removed. An error in the `with` block removes what is unfinished.

    Args:
        output: its name.
        names: what may be written, which the header needs room for.

    Raises:
        BusyError: another process makes it.
        OutlierMergeError: something has the name, or what is unfinished there is no adapter.
    """

    def __init__(self, output: Path, names: list[str]) -> None:
        self.final = real_output(output)
        self.folder = partial_folder(self.final)
        if not os.path.lexists(journal_path(self.final)):
            refuse_taken(self.final)
        self._journal = Journal(self.final)
        try:
            self._begin()
        except BaseException:
            self._journal.close()
            raise
        room = 64 + sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names)
        self._room = -(-room // 8) * 8
        self._entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._end = 0
        self._file.seek(8 + self._room)

    def _begin(self) -> None:
        """Remove what a killed run has left, and make the folder."""
        began, files = self._journal.identity, self._journal.all("files")
        if began is not None and began != _IDENTITY:
            raise OutlierMergeError(
                f"{self.folder}: was begun by a merge, which goes on by its own command. Choose "
                f"another output, or remove it and {self._journal.path}."
            )
        if os.path.lexists(self.final):
            if began is not None:  # killed when it had its name
                self._journal.remove()
            refuse_taken(self.final)
        _remove_unfinished(self.folder, {*_NAMES, *(name for names in files for name in names)})
        self._journal.begin(_IDENTITY, process=process())
        with naming(self.folder, "written"):
            self.folder.mkdir()
            self._file = (self.folder / WEIGHTS_NAME).open("wb")

    def add(
        self, name: str, dtype: DType, shape: tuple[int, ...], blocks: Iterator[Tensor]
    ) -> None:
        """Write a tensor, given in blocks one after the other."""
        import torch

        start = self._end
        with naming(self.folder / WEIGHTS_NAME, "written"):
            for block in blocks:
                data: Any = block.contiguous().cpu().view(-1).view(torch.uint8).numpy()
                self._file.write(memoryview(data))
                self._end += data.nbytes
        entry = {"dtype": dtype.code, "shape": list(shape), "data_offsets": [start, self._end]}
        self._entries[name] = entry

    @property
    def num_bytes(self) -> int:
        """The bytes of the tensors so far."""
        return self._end

    def close_weights(self, config: Mapping[str, Any]) -> None:
        """Write the header and the config, so that the folder can be read."""
        header = json.dumps(self._entries, separators=(",", ":")).encode()
        assert len(header) <= self._room
        with naming(self.folder / WEIGHTS_NAME, "written"):
            self._file.seek(0)
            self._file.write(struct.pack("<Q", self._room) + header.ljust(self._room))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        write_beside(self.folder, {CONFIG_NAME: _json(config)})

    def finish(self, report: Mapping[str, Any], others: Mapping[str, Path]) -> None:
        """Write the report and copies of further files, and give the folder its name."""
        self._journal.add({"files": [*others]})
        write_beside(self.folder, {REPORT_NAME: _json(report), **others})
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
        if error is not None:
            with suppress(OSError, OutlierMergeError):  # the next run removes what stays
                self._file.close()
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


def _remove_unfinished(folder: Path, known: set[str]) -> None:
    """Remove what a killed run has left; nothing else can be in such a folder."""
    if not os.path.lexists(folder):
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if others := sorted(names - known):
        raise OutlierMergeError(
            f"{folder}: is there, and has {shown(others[0])}, which no unfinished adapter has. "
            "Move it away."
        )
    with naming(folder, "removed"):
        shutil.rmtree(folder)


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode()
