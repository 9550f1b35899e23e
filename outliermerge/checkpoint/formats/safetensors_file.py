"""Reads and writes headers of the safetensors format, by its published rules.

Format: https://huggingface.co/docs/safetensors (8-byte little-endian header length, JSON header,
then the tensors' bytes without holes).
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, chain
from operator import itemgetter, mul
from pathlib import Path
from sys import intern
from typing import Any

from outliermerge.checkpoint.sources import DTYPES_BY_CODE, MAX_TENSOR_NAME, DType, TensorMeta
from outliermerge.errors import OutlierMergeError, listing, quoted, shown
from outliermerge.storage.files import check_file
from outliermerge.storage.lfs import refuse_lfs_pointer
from outliermerge.storage.stamps import open_file
from outliermerge.storage.stand_ins import true_size

MAX_HEADER_BYTES = 100_000_000
# Fifteen values for each of 260,000 tensors; models have up to 100,000 tensors. Tensors of PyTorch
# have up to 64 axes.
MAX_HEADER_VALUES, MAX_AXES = 4_000_000, 64
PAGE_BYTES = 4096
Metadata = dict[str, str]
Placed = tuple[int, int, TensorMeta]
"""Where a tensor begins in its file, its bytes, and the tensor."""
# A space before a colon, and a backslash at the end of a text.
_UNUSUAL = re.compile(r'"\s+:|\\\\"')
# A header as all known writers write it: no spaces, no escapes, and the keys in this order. Finding
# its entries takes a fifth of the time that JSON takes.
_METADATA = re.compile(r'\{"__metadata__":(\{[^{}]*\}),')
_ENTRY = re.compile(
    r'"([^"\\\x00-\x1f]+)":\{("dtype":"[A-Z0-9_]+","shape":\[[0-9,]*\]),'
    r'"data_offsets":\[(0|[1-9][0-9]{0,17}),(0|[1-9][0-9]{0,17})\]\}(?:,|\}\Z)'
)
_AROUND = len('"":{,"data_offsets":[,]},')  # the characters of an entry that are not in groups


def read_header(path: Path) -> list[TensorMeta]:
    """Return the tensors of a file in the order of their bytes.

    Raises:
        OutlierMergeError: the file is truncated or its header breaks the format's rules.
    """
    return read_header_and_metadata(path)[0]


def read_header_and_metadata(path: Path) -> tuple[list[TensorMeta], dict[str, str]]:
    """Return the tensors of a file in the order of their bytes, and its header's metadata.

    Raises:
        OutlierMergeError: as for read_header.
    """
    check_file(path)
    try:
        return _parse(path)
    except OSError as error:
        raise OutlierMergeError(f"{path}: cannot be read: {error.strerror}") from error


def read_file(path: Path) -> tuple[list[TensorMeta], list[str], dict[str, str]]:
    """Return the tensors of a file, no notes, and its header's other texts.

    Raises:
        OutlierMergeError: as for read_header.
    """
    metas, metadata = read_header_and_metadata(path)
    return metas, [], metadata


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a file's header; empty if the header cannot be read.

    For such a file `read_header` raises an error that says what is wrong.
    """
    try:
        return read_header_and_metadata(path)[1]
    except OutlierMergeError:
        return {}


def _parse(path: Path) -> tuple[list[TensorMeta], dict[str, str]]:
    with open_file(path) as file:
        num_file_bytes = true_size(path, os.fstat(file.fileno()).st_size)
        prefix = file.read(8)
        if len(prefix) < 8:
            raise OutlierMergeError(
                f"{path}: not a safetensors file: {num_file_bytes} bytes, "
                "expected at least the 8 bytes of the header's length. Fetch it again."
            )
        (header_length,) = struct.unpack("<Q", prefix)
        if header_length > MAX_HEADER_BYTES:
            refuse_lfs_pointer(path)
            raise OutlierMergeError(
                f"{path}: the header claims {header_length} bytes, "
                f"more than the {MAX_HEADER_BYTES} allowed: not a safetensors file."
            )
        if 8 + header_length > num_file_bytes:
            raise OutlierMergeError(
                f"{path}: truncated: the header needs {8 + header_length} bytes, "
                f"the file has {num_file_bytes}. Fetch it again."
            )
        raw = file.read(header_length)
    # Each of these characters begins a value, which takes about a hundred bytes of memory.
    if (num_values := sum(map(raw.count, (b"{", b"[", b",", b":")))) > MAX_HEADER_VALUES:
        raise OutlierMergeError(
            f"{path}: the header has some {num_values:,} values, more than the "
            f"{MAX_HEADER_VALUES:,} allowed: not a model's file. Fetch it again."
        )
    data_start = 8 + header_length
    usual = _read_usual(path, raw, data_start)
    placed, metadata = _read_any(path, raw, data_start) if usual is None else usual
    placed.sort(key=itemgetter(0, 1))
    _check_contiguous(path, placed, data_start, num_file_bytes)
    return [meta for _, _, meta in placed], metadata


def _read_usual(path: Path, raw: bytes, data_start: int) -> tuple[list[Placed], Metadata] | None:
    """Read a header that is written as usual; return None for any other, and for a broken one."""
    if not raw.isascii():
        return None
    text = raw.decode().rstrip(" ")
    start = _METADATA.match(text)
    begin = start.end() if start else 1
    found = _ENTRY.findall(text, begin)
    # All of the text must be entries, one after the other.
    num_matched = begin + len(found) * _AROUND + sum(map(len, chain.from_iterable(found)))
    names = {name for name, _, _, _ in found}
    if text[:1] != "{" or num_matched != len(text) or len(names) < len(found) or not found:
        return None
    if "__metadata__" in names or max(map(len, names)) > MAX_TENSOR_NAME:
        return None
    placed = []
    try:
        metadata = _texts(_decoded(start[1].encode())) if start else {}
        for name, kind, first, last in found:
            dtype, shape, num_bytes = _kind_of(kind)
            if int(last) - int(first) != num_bytes:
                return None
            offset = data_start + int(first)
            placed.append((offset, num_bytes, TensorMeta(intern(name), dtype, shape, path, offset)))
    except (ValueError, _DuplicateKeyError):
        return None
    return placed, metadata


@lru_cache(maxsize=4096)
def _kind_of(text: str) -> tuple[DType, tuple[int, ...], int]:
    """Return the dtype, shape and bytes that an entry states; most occur many times."""
    entry = json.loads(f"{{{text}}}")
    return _checked_kind(entry["dtype"], entry["shape"])


def _read_any(path: Path, raw: bytes, data_start: int) -> tuple[list[Placed], Metadata]:
    try:
        header = _decoded(raw)
    except (ValueError, RecursionError) as error:
        raise OutlierMergeError(f"{path}: the header is not valid JSON: {error}") from error
    except _DuplicateKeyError as error:
        raise OutlierMergeError(f"{path}: the header names {error} twice") from error
    if not isinstance(header, dict):
        raise OutlierMergeError(f"{path}: the header is not a JSON object")
    try:
        metadata = _texts(header.pop("__metadata__", None))
    except ValueError as error:
        raise OutlierMergeError(f"{path}: the header's __metadata__ {error}") from error
    return [_checked(path, name, entry, data_start) for name, entry in header.items()], metadata


def _texts(metadata: object) -> Metadata:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("is not an object of texts")
    return metadata


class _DuplicateKeyError(Exception):
    pass


def _decoded(raw: bytes) -> Any:
    """Return the value of a JSON text; no object in it names a key twice.

    Raises:
        ValueError, RecursionError: it is not valid.
        _DuplicateKeyError: a key stands twice.
    """
    text = raw.decode("utf-8")
    header = json.loads(text)
    # Decoding takes much longer with a look at each object. Usually the colons behind quotes are
    # as many as there are keys, so that none has been lost.
    num_colons = text.count('":') - text.count('\\":')
    is_usual = isinstance(header, dict) and not _UNUSUAL.search(text)
    if not is_usual or num_colons != _num_keys(header):
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    return header


def _num_keys(header: dict[str, Any]) -> int:
    return len(header) + sum(len(entry) for entry in header.values() if type(entry) is dict)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateKeyError(quoted(key))
        result[key] = value
    return result


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _checked(path: Path, name: str, entry: object, data_start: int) -> Placed:
    def fail(what: str) -> OutlierMergeError:
        return OutlierMergeError(f"{path}: tensor {quoted(name)}: {what}")

    if any("\ud800" <= character <= "\udfff" for character in name):
        raise fail("its name is not valid Unicode")
    if len(name) > MAX_TENSOR_NAME:
        raise fail(f"its name has {len(name):,} characters, the limit is {MAX_TENSOR_NAME:,}")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise fail("its header entry needs dtype, shape and data_offsets")
    try:
        dtype, shape, num_bytes = _checked_kind(entry["dtype"], entry["shape"])
    except ValueError as error:
        raise fail(str(error)) from error
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise fail(f"data_offsets {quoted(offsets)} are not two positions")
    if offsets[1] - offsets[0] != num_bytes:
        raise fail(
            f"data_offsets span {offsets[1] - offsets[0]} bytes, "
            f"but {dtype.name} of shape {quoted([*shape])} needs {num_bytes}"
        )
    offset = data_start + offsets[0]
    return offset, num_bytes, TensorMeta(intern(name), dtype, shape, path, offset)


def _checked_kind(code: object, shape: object) -> tuple[DType, tuple[int, ...], int]:
    """Return the dtype and shape of an entry of a header, and the bytes that they take.

    Raises:
        ValueError: they are no dtype or shape that is supported.
    """
    dtype = DTYPES_BY_CODE.get(code) if isinstance(code, str) else None
    if dtype is None:
        # F4, F6_… and other dtypes that only quantised models use.
        is_code = isinstance(code, str) and code.startswith(("F4", "F6", "F8"))
        more = ". Name the model that it was quantised from instead" if is_code else ""
        known = ", ".join(DTYPES_BY_CODE)
        raise ValueError(f"unknown dtype {quoted(code)}{more}. Supported: {known}")
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_AXES
        or not all(_is_count(size) for size in shape)
        or any(count >= 2**64 for count in accumulate(shape, mul))
    ):
        raise ValueError(f"shape {quoted(shape)} is not a list of sizes")
    return dtype, tuple(shape), math.prod(shape) * dtype.num_bytes


def _check_contiguous(
    path: Path, placed: Sequence[Placed], data_start: int, num_file_bytes: int
) -> None:
    position = data_start
    for offset, num_bytes, meta in placed:
        if offset != position:
            what = "overlaps the tensor before it" if offset < position else "follows a hole"
            raise OutlierMergeError(
                f"{path}: tensor {quoted(meta.name)} {what}: it starts at byte {offset}, "
                f"expected {position}"
            )
        position += num_bytes
    if position != num_file_bytes:
        what = "truncated" if position > num_file_bytes else "longer than its tensors"
        raise OutlierMergeError(
            f"{path}: {what}: its tensors end at byte {position}, "
            f"the file has {num_file_bytes}. Fetch it again."
        )


def make_header(
    tensors: Iterable[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[int]]:
    """Return a file's first bytes and the absolute offset of each tensor.

    The header is padded with spaces, so that the data starts at a page boundary.

    Args:
        metadata: the texts for the header's metadata, without the format.
    """
    position = 0
    starts: list[int] = []
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    for name, dtype, shape in tensors:
        num_bytes = math.prod(shape) * dtype.num_bytes
        starts.append(position)
        header[name] = {
            "dtype": dtype.code,
            "shape": list(shape),
            "data_offsets": [position, position + num_bytes],
        }
        position += num_bytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-(8 + len(raw)) % PAGE_BYTES)
    data_start = 8 + len(raw)
    return struct.pack("<Q", len(raw)) + raw, [data_start + start for start in starts]


def duplicates(metas: Iterable[TensorMeta]) -> str:
    """Return a listing of the tensors that two files both contain."""
    seen: dict[str, Path] = {}
    twice: list[str] = []
    for meta in metas:
        if meta.name in seen:
            twice.append(f"{shown(meta.name)} in {seen[meta.name].name} and {meta.path.name}")
        seen[meta.name] = meta.path
    return listing(twice)
