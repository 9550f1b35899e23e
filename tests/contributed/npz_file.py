"""NumPy's archives (.npz), as MLX and NumPy save weights: arrays read where they lie in a zip.

Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

from numpy.lib import format as npy

from outliermerge.checkpoint.sources import DTYPES, TensorMeta, is_name
from outliermerge.errors import OutlierMergeError, quoted
from outliermerge.storage.files import check_file
from outliermerge.storage.stamps import open_file

_LOCAL_HEADER_BYTES = 30


def read_file(path: Path) -> tuple[list[TensorMeta], list[str], dict[str, str]]:
    """Return the arrays of a file; there are neither notes nor texts.

    Raises:
        OutlierMergeError: it is no archive, or an array is compressed, pickled, not in C order or
            of a dtype that torch does not have.
    """
    check_file(path)
    try:
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            metas = [_tensor(path, archive, entry) for entry in entries]
    except (zipfile.BadZipFile, struct.error, EOFError) as error:
        raise OutlierMergeError(f"{path}: not an archive of arrays: {error}") from error
    except OSError as error:
        raise OutlierMergeError(f"{path}: cannot be read: {error.strerror}") from error
    if len({meta.name for meta in metas}) < len(metas):
        raise OutlierMergeError(f"{path}: has two arrays of one name")
    return metas, [], {}


def _tensor(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> TensorMeta:
    name = entry.filename.removesuffix(".npy")

    def fail(what: str) -> OutlierMergeError:
        return OutlierMergeError(f"{path}: array {quoted(name)}: {what}")

    if not is_name(name):
        raise fail("this cannot be a tensor's name")
    if entry.compress_type != zipfile.ZIP_STORED:
        raise fail("is compressed. Save it again with numpy.savez")
    with archive.open(entry) as member:
        try:
            version = npy.read_magic(member)
            read_header = npy.read_array_header_1_0 if version == (1, 0) else None
            read_header = npy.read_array_header_2_0 if version == (2, 0) else read_header
            if read_header is None:
                raise ValueError(f"version {version} of its header is not known")
            shape, is_fortran, dtype = read_header(member)
        except ValueError as error:
            raise fail(str(error)) from error
        header_bytes = member.tell()
    if dtype.name not in DTYPES or not dtype.isnative:
        raise fail(f"dtype {dtype.str} is not read. Supported: {', '.join(DTYPES)}")
    if is_fortran and len(shape) > 1:
        raise fail("its columns lie one behind the other. Save numpy.ascontiguousarray of it")
    # The archive's own list does not tell how long the names before the bytes are.
    archive.fp.seek(entry.header_offset)  # type: ignore[union-attr]
    local = archive.fp.read(_LOCAL_HEADER_BYTES)  # type: ignore[union-attr]
    before_bytes = _LOCAL_HEADER_BYTES + sum(struct.unpack("<HH", local[26:30]))
    offset = entry.header_offset + before_bytes + header_bytes
    meta = TensorMeta(name, DTYPES[dtype.name], tuple(shape), path, offset)
    if header_bytes + meta.num_bytes != entry.file_size:
        raise fail(
            f"{dtype.name} of shape {quoted(list(shape))} needs {meta.num_bytes} bytes, "
            f"but it has {entry.file_size - header_bytes}. Fetch it again"
        )
    return meta
