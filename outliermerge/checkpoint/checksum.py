"""Checksums of tensors that threads can compute in pieces, and of whole files.

A tensor's checksum is xxh3_128 of the concatenated xxh3_128 digests of its pieces of 65,536
elements (the last piece may be shorter). So it depends on neither block size nor thread count.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import xxhash

from outliermerge.checkpoint.layout import OutputTensor
from outliermerge.checkpoint.sources import Reading, Source

PIECE_ELEMENTS = 65_536
"""How many elements have one digest. PIECE in engines/native/block.h is the same number."""
DIGEST_BYTES = 16
_BLOCK_ELEMENTS = 16 * PIECE_ELEMENTS


def piece_digests(data: memoryview, num_item_bytes: int) -> bytes:
    """Return the concatenated digests of a block's pieces; it starts where a piece starts."""
    step = PIECE_ELEMENTS * num_item_bytes
    return b"".join(
        xxhash.xxh3_128_digest(data[start : start + step]) for start in range(0, len(data), step)
    )


def tensor_checksum(digests: Iterable[bytes]) -> str:
    """Return a tensor's checksum from its pieces' digests, in order."""
    return xxhash.xxh3_128_hexdigest(b"".join(digests))


def source_checksum(source: Source, reader: Reading) -> str:
    """Return the checksum of a tensor, which is read for it."""
    size, digests = source.dtype.num_bytes, []
    for start in range(0, source.num_elements, _BLOCK_ELEMENTS):
        stop = min(start + _BLOCK_ELEMENTS, source.num_elements)
        raw = memoryview(bytearray((stop - start) * size))
        source.read(reader, start, stop, raw)
        digests.append(piece_digests(raw, size))
    return tensor_checksum(digests)


GGUF_KEY = "outliermerge.header_bytes"
"""The first metadata of a GGUF file of ours: how many bytes are before its first tensor."""


def header_checksum(path: Path) -> str:
    """Return the checksum of the bytes before the first tensor of a safetensors file.

    Or of a GGUF file that this package has written.
    """
    with path.open("rb") as file:
        length = file.read(8)
        there = os.fstat(file.fileno()).st_size
        if length[:4] == b"GGUF":
            at = 24 + 8 + len(GGUF_KEY) + 4
            start = length + file.read(at)
            num_bytes = int.from_bytes(start[at : at + 8], "little")
            is_ours = start[32 : at - 4] == GGUF_KEY.encode() and num_bytes <= there
            start += file.read(num_bytes - len(start)) if is_ours else b""
            return xxhash.xxh3_128_hexdigest(start)
        header = file.read(min(int.from_bytes(length, "little"), there))
        if len(length + header) < min(8 + int.from_bytes(length, "little"), there):
            raise EOFError("the file ends early")
        return xxhash.xxh3_128_hexdigest(length + header)


def file_checksum(path: Path) -> str:
    """Return a file's SHA-256, the checksum that the hub shows."""
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            num_bytes += len(block)
        if num_bytes < os.fstat(file.fileno()).st_size:
            raise EOFError("the file ends early")
    return digest.hexdigest()


def checksum_in_file(read: Callable[[int, memoryview], None], tensor: OutputTensor) -> str:
    """Return the checksum of a tensor's bytes in a file.

    Args:
        read: fills memory from the file at a position.

    Raises:
        EOFError: the file ends before the tensor does.
    """
    buffer = memoryview(bytearray(_BLOCK_ELEMENTS * tensor.dtype.num_bytes))
    num_bytes = tensor.num_bytes
    digests = []
    for start in range(0, num_bytes, len(buffer)):
        part = buffer[: min(len(buffer), num_bytes - start)]
        read(tensor.offset + start, part)
        digests.append(piece_digests(part, tensor.dtype.num_bytes))
    return tensor_checksum(digests)
