"""Writes an adapter's folder: tensors as they come, then the header, the config and the report."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outliermerge.checkpoint.adapters.config import CONFIG_NAME, FILE_NAMES
from outliermerge.checkpoint.sources import DType
from outliermerge.errors import OutlierMergeError, shown
from outliermerge.output.names import partial_folder, real_output
from outliermerge.storage.failures import naming

if TYPE_CHECKING:
    from torch import Tensor

REPORT_NAME = "extraction.json"
WEIGHTS_NAME = FILE_NAMES[0]
_DIGITS = 15  # of a position in a file
_ENTRY_BYTES = 130 + 2 * _DIGITS  # of a header, without the tensor's name


class AdapterFolder:
    """A folder in the making. It has its name when `finish` returns; until then NAME.partial.

    Args:
        output: its name.
        names: what may be written, which the header needs room for.

    Raises:
        OutlierMergeError: something has the name.
    """

    def __init__(self, output: Path, names: list[str]) -> None:
        self.final = real_output(output)
        refuse_taken(self.final)
        self.folder = partial_folder(self.final)
        _remove_unfinished(self.folder)
        with naming(self.folder, "written"):
            self.folder.mkdir(parents=True)
            self._file = (self.folder / WEIGHTS_NAME).open("wb")
        room = 64 + sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names)
        self._room = -(-room // 8) * 8
        self._entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._end = 0
        self._file.seek(8 + self._room)

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
            _sync(self._file)
            self._file.close()
        self._write_json(CONFIG_NAME, config)

    def finish(self, report: Mapping[str, Any], others: Mapping[str, Path]) -> None:
        """Write the report and copies of further files, and give the folder its name."""
        self._write_json(REPORT_NAME, report)
        for name, path in others.items():
            with naming(self.folder / name, "written"):
                shutil.copyfile(path, self.folder / name)
        refuse_taken(self.final)
        with naming(self.final, "written"):
            self.folder.rename(self.final)

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        with naming(self.folder / name, "written"), (self.folder / name).open("wb") as file:
            file.write(text.encode())
            _sync(file)

    def discard(self) -> None:
        """Remove what is unfinished."""
        self._file.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def refuse_taken(output: Path) -> None:
    """Refuse a name that something has.

    Raises:
        OutlierMergeError: something has it.
    """
    if os.path.lexists(output):
        raise OutlierMergeError(f"{output}: is there already. Name another folder, or remove it.")


def _remove_unfinished(folder: Path) -> None:
    """Remove what a killed run has left; nothing else can be in such a folder."""
    if not os.path.lexists(folder):
        return
    known = {WEIGHTS_NAME, CONFIG_NAME, REPORT_NAME}
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if others := sorted(names - known):
        raise OutlierMergeError(
            f"{folder}: is there, and has {shown(others[0])}, which no unfinished adapter has. "
            "Move it away."
        )
    shutil.rmtree(folder)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
