"""Reads headers of GGUF files by the format's published rules.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
Tensors of quantised types are described as bytes (…, bytes of a row).
"""

from __future__ import annotations

import json
import math
import os
import struct
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

from outliermerge.checkpoint.sources import DTYPES, TensorMeta, is_name
from outliermerge.errors import OutlierMergeError, quoted
from outliermerge.optional import require_package
from outliermerge.storage.files import check_file
from outliermerge.storage.lfs import refuse_lfs_pointer
from outliermerge.storage.stamps import open_file

HEADER = "gguf"
"""The key of a file's texts under which the types of its tensors and its values are, as JSON."""
REFETCH = ". Fetch it again."
"""The advice that ends a message about a broken file."""

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_PLAIN = {0: "float32", 1: "float16", 30: "bfloat16"}
# By the number of a value's type how it is stored; 8 is a text, 9 a list.
_VALUES = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q",
           11: "<q", 12: "<d"}  # fmt: skip
_TEXT, _LIST = 8, 9
# Models have up to some 60 values, 3,000 tensors, and lists of 300,000 tokens.
_MAX_VALUES, _MAX_TENSORS, _MAX_LIST, _MAX_TEXT = 10_000, 1_000_000, 10_000_000, 1 << 24
_MAX_KEPT = 4096  # the longest list whose values are kept: one for each layer
_MAX_AXES = 4


def read_file(path: Path) -> tuple[list[TensorMeta], list[str], dict[str, str]]:
    """Return the tensors of a file, no notes, and its values and the tensors' types as a text.

    Raises:
        OutlierMergeError: the file is truncated, its header breaks the format's rules, or the
            package gguf is not installed.
    """
    require_package("gguf", f"reading {path}", "gguf")
    check_file(path)
    refuse_lfs_pointer(path)
    with open_file(path) as file:
        header = _Header(path, file)
        metas, types = header.read()
    text = json.dumps({"values": header.values, "counts": header.counts, "types": types})
    return metas, [], {HEADER: text}


class _Header:
    """What is read of one file.

    Attributes:
        values: the values by their keys; of lists only short ones.
        counts: how many elements lists have.
    """

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self._path, self._file = path, file
        self._size = os.fstat(file.fileno()).st_size
        self.values: dict[str, Any] = {}
        self.counts: dict[str, int] = {}

    def read(self) -> tuple[list[TensorMeta], dict[str, int]]:
        if (magic := self._bytes(4)) != _MAGIC:
            self._fail(f"not a GGUF file: it begins with {magic!r}, expected {_MAGIC!r}")
        version = self._number("<I")
        if version not in _VERSIONS:
            swapped = struct.unpack(">I", struct.pack("<I", version))[0] in _VERSIONS
            what = "big-endian" if swapped else f"of version {version}"
            self._fail(f"GGUF {what}, which cannot be read (little-endian of version 2 and 3 can)")
        num_tensors, num_values = self._number("<Q"), self._number("<Q")
        if num_tensors > _MAX_TENSORS or num_values > _MAX_VALUES:
            self._fail(
                f"the header claims {num_tensors:,} tensors and {num_values:,} values, more than "
                f"the {_MAX_TENSORS:,} and {_MAX_VALUES:,} allowed"
            )
        for _ in range(num_values):
            key = self._text()
            if key in self.values or key in self.counts:
                self._fail(f"the header names {quoted(key)} twice")
            self._value(key, self._number("<I"))
        entries = [self._tensor() for _ in range(num_tensors)]
        align = self.values.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1 or align & align - 1 or align > 1 << 20:
            self._fail(f"its general.alignment is {align!r}, expected a power of two")
        start = -(-self._file.tell() // align) * align
        metas = [self._meta(start, align, *entry) for entry in entries]
        self._check_places(metas)
        types = {name: kind for name, _, kind, _ in entries}
        if len(types) < len(entries):
            names = [name for name, *_ in entries]
            self._fail(f"the header names {quoted(max(names, key=names.count))} twice")
        return metas, types

    def _meta(
        self, start: int, align: int, name: str, shape: tuple[int, ...], kind: int, offset: int
    ) -> TensorMeta:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            block, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (KeyError, ValueError):
            self._fail(f"tensor {quoted(name)}: its type {kind} is not known to the package gguf")
        if offset % align:
            self._fail(f"tensor {quoted(name)}: starts at {offset}, no multiple of {align}")
        dtype = DTYPES[_PLAIN.get(kind, "uint8")]
        if kind not in _PLAIN:
            if not shape or shape[-1] % block:
                self._fail(f"tensor {quoted(name)}: has the shape {shape}, but {block} elements of "
                           f"a row make a block of the type {kind}")  # fmt: skip
            shape = (*shape[:-1], shape[-1] // block * num_bytes)
        return TensorMeta(name, dtype, shape, self._path, start + offset)

    def _check_places(self, metas: list[TensorMeta]) -> None:
        end = 0
        for meta in sorted(metas, key=lambda meta: (meta.offset or 0, meta.num_bytes)):
            assert meta.offset is not None
            if meta.offset < end:
                self._fail(f"tensor {quoted(meta.name)} overlaps the tensor before it")
            end = meta.offset + meta.num_bytes
            if end > self._size:
                self._fail(
                    f"truncated: tensor {quoted(meta.name)} ends at byte {end}, the file has "
                    f"{self._size}"
                )

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text()
        if not is_name(name):
            self._fail(f"{quoted(name)} is no name of a tensor")
        num_axes = self._number("<I")
        if num_axes > _MAX_AXES:
            self._fail(f"tensor {quoted(name)}: has {num_axes} axes, at most {_MAX_AXES} expected")
        sizes = [self._number("<Q") for _ in range(num_axes)]  # the last axis comes first
        if any(size < 1 for size in sizes) or math.prod(sizes) >= 1 << 63:
            self._fail(f"tensor {quoted(name)}: {sizes} are not the sizes of a tensor")
        return name, tuple(reversed(sizes)), self._number("<I"), self._number("<Q")

    def _value(self, key: str, kind: int) -> None:
        if kind != _LIST:
            self.values[key] = self._single(key, kind)
            return
        inner, count = self._number("<I"), self._number("<Q")
        if count > _MAX_LIST:
            self._fail(f"{quoted(key)} is a list of {count:,} values, {_MAX_LIST:,} allowed")
        self.counts[key] = count
        if inner not in _VALUES and inner != _TEXT:
            self._fail(f"{quoted(key)} is a list of values of the type {inner}, which is not known")
        if inner != _TEXT and count > _MAX_KEPT:
            self._skip(count * struct.calcsize(_VALUES[inner]))
            return
        if count <= _MAX_KEPT:
            self.values[key] = [self._single(key, inner) for _ in range(count)]
            return
        for _ in range(count):  # tokens
            self._skip(self._number("<Q"))

    def _single(self, key: str, kind: int) -> Any:
        if kind == _TEXT:
            return self._text()
        if kind not in _VALUES:
            self._fail(f"{quoted(key)} is a value of the type {kind}, which is not known")
        return self._number(_VALUES[kind])

    def _text(self) -> str:
        length = self._number("<Q")
        if length > _MAX_TEXT:
            self._fail(f"the header has a text of {length:,} bytes, {_MAX_TEXT:,} allowed")
        return self._bytes(length).decode("utf-8", "replace")

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))[0]

    def _skip(self, num_bytes: int) -> None:
        if num_bytes > self._size - self._file.tell():
            self._fail("truncated: it ends within its header")
        self._file.seek(num_bytes, os.SEEK_CUR)

    def _bytes(self, length: int) -> bytes:
        try:
            found = self._file.read(length)
        except OSError as error:
            raise OutlierMergeError(f"{self._path}: cannot be read: {error.strerror}") from error
        if len(found) < length:
            self._fail("truncated: it ends within its header")
        return found

    def _fail(self, what: str) -> NoReturn:
        raise OutlierMergeError(f"{self._path}: {what}{REFETCH}")
