"""Which files of a folder may be read: regular files inside it, and no links that lead elsewhere.

Also reads small files within size limits, and writes them whole or not at all.
"""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path
from typing import Any

from outliermerge.errors import OutlierMergeError, quoted, shown
from outliermerge.storage.hub_cache import blobs_of, is_cached
from outliermerge.storage.json_text import MAX_VALUES, parse_json
from outliermerge.storage.stamps import note_absent, open_file, refuse_text
from outliermerge.storage.system import refuse_special

# The most bytes in a small file, so that a hostile file does not fill the memory (a sparse file of
# terabytes is made in a moment). The largest known files: a tokenizer.json of 33 MB with 2.2
# million values (Gemma 3), an index of 9 MB (DeepSeek-V3), our manifest of 46,000 tensors and eight
# models with 60 MB, a config of 2 MB with 21,000 labels.
MAX_SMALL_BYTES, MAX_LARGE_BYTES, MAX_MANIFEST_BYTES = 16 << 20, 64 << 20, 256 << 20
MAX_SMALL_VALUES = 1_000_000
MAX_MANIFEST_VALUES = 10_000_000  # 46,000 tensors of eight models give about 5 million
_LARGE = re.compile(
    r"\.index(\.\w+)?\.json$|^(tokenizer|vocab|encoder|tekken|added_tokens)\.json$"
    r"|\.(?!json|jinja|py)\w+$"
)
# Unicode categories that names of a model's files do not need: control and format characters,
# surrogates, line and paragraph separators.
_NO_SIGNS = ("Cc", "Cf", "Cs", "Zl", "Zp")


def check_file(path: Path, folder: Path | None = None) -> None:
    """Raise OutlierMergeError unless a path is a regular file inside a folder.

    Links inside the folder are followed, and links into the hub's cache, which holds only files
    fetched from the hub. A link to another place could copy a private file into the output.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
        if isinstance(error, FileNotFoundError) and path.is_symlink():
            what = f"is a link to {path.readlink()}, which is not there. Fetch the model again."
        raise OutlierMergeError(f"{path}: {what}") from error
    refuse_special(path, mode)
    refuse_text(path)
    if folder is None:
        return
    name = str(path.relative_to(folder)) if path.is_relative_to(folder) else path.name
    if any(unicodedata.category(sign) in _NO_SIGNS for sign in name):
        raise OutlierMergeError(
            f"{shown(folder)}: has a file {quoted(name)}, a name that is no text or controls a "
            "terminal. Rename it, or take it out of the folder."
        )
    inside, real = folder.resolve(), path.resolve()
    if real.is_relative_to(inside) or is_cached(real):
        return
    if not any(real.is_relative_to(blobs) for blobs in blobs_of(inside)):
        raise OutlierMergeError(
            f"{path}: is a link out of the folder to {real}: refused. "
            "Copy the file into the folder, or name the folder that it is in."
        )


def names_in(folder: Path) -> list[str]:
    """Return the sorted names in a folder.

    Raises:
        OutlierMergeError: it cannot be listed, or a name is not UTF-8.
    """
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise OutlierMergeError(f"{folder}: cannot be read: {error.strerror}") from error
    for path in paths:
        refuse_text(path)
    return [path.name for path in paths]


def read_bytes(path: Path, *, max_bytes: int | None = None) -> bytes | None:
    """Return a small file's bytes, or None where there is no such file.

    Args:
        max_bytes: the most bytes it may have; by default the limit for files of its name.

    Raises:
        OutlierMergeError: the file exists and cannot be read, is not a regular file, or is too
            large.
    """
    limit = max_bytes or _max_bytes(path)
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            _check_size(path, size, limit)
            # Count the bytes that are read as well: files grow, and some report no size.
            data = file.read(limit + 1)
            if len(data) < size:
                raise OutlierMergeError(f"{path}: ends early, at byte {len(data):,} of {size:,}")
    except (FileNotFoundError, NotADirectoryError) as error:
        if not path.is_symlink():
            note_absent(path)
            return None
        what = f"is a link to {path.readlink()}, which is not there. Fetch the model again."
        raise OutlierMergeError(f"{path}: {what}") from error
    except OSError as error:
        raise OutlierMergeError(f"{path}: cannot be read: {error.strerror}") from error
    _check_size(path, len(data), limit)
    return data


def small_bytes(path: Path) -> bytes:
    """Return the bytes of a small file that must exist.

    Raises:
        OutlierMergeError: as for read_bytes, or the file does not exist.
    """
    data = read_bytes(path)
    if data is None:
        raise OutlierMergeError(f"{path}: is gone. Fetch the model again.")
    return data


def _check_size(path: Path, num_bytes: int, limit: int) -> None:
    if num_bytes > limit:
        raise OutlierMergeError(
            f"{path}: has {num_bytes:,} bytes, more than the {limit:,} that such a file may have. "
            "Fetch it again; take it out of the folder if it is no part of the model."
        )


def _max_bytes(path: Path) -> int:
    return MAX_LARGE_BYTES if _LARGE.search(path.name) else MAX_SMALL_BYTES


def load_json(path: Path) -> Any:
    """Return the value in a JSON file, or None if there is no such file.

    Raises:
        OutlierMergeError: the file is not JSON that loaders accept; the message says what was
            found, and where.
    """
    data = read_bytes(path)
    if data is None:
        return None
    try:
        # The tokenizers library reads this file; Python's parser reads the others.
        return parse_json(
            data,
            infinite=path.name != "tokenizer.json",
            max_values=MAX_VALUES if _LARGE.search(path.name) else MAX_SMALL_VALUES,
        )
    except ValueError as error:
        raise OutlierMergeError(f"{path}: {error}") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all; a link stays, and its target is replaced.

    Raises:
        OutlierMergeError: there is no such folder.
        OSError: it cannot be written.
    """
    if not path.parent.is_dir():
        raise OutlierMergeError(f"{path}: cannot be written: there is no folder {path.parent}")
    path = path.resolve()
    if path.exists() and not path.is_file():  # write to a pipe or a device, do not replace it
        path.write_bytes(content)
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
