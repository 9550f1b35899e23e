"""Which files of a folder are read: regular ones that lie in it, not what links elsewhere.

And how small files are read, within limits, and written: whole, or not at all.
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

# What a small file may hold, so that a hostile one costs no memory to speak of: a sparse file of
# terabytes is made in a moment. The largest that are known: tokenizer.json 33 MB with 2.2 million
# values (Gemma 3), an index of 9 MB (DeepSeek-V3), our own manifest of 46,000 tensors and eight
# models 60 MB; a config with 21,000 labels is of 2 MB.
MAX_SMALL_BYTES, MAX_LARGE_BYTES, MAX_MANIFEST_BYTES = 16 << 20, 64 << 20, 256 << 20
MAX_SMALL_VALUES = 1_000_000
_LARGE = re.compile(
    r"\.index(\.\w+)?\.json$|^(tokenizer|vocab|encoder|tekken|added_tokens)\.json$"
    r"|\.(?!json|jinja|py)\w+$"
)
# Kinds of signs that a file of a model has no use for in its name: those that control a terminal
# or the direction of text, halves of signs, breaks of lines.
_NO_SIGNS = ("Cc", "Cf", "Cs", "Zl", "Zp")


def check_file(path: Path, folder: Path | None = None) -> None:
    """Raise OutlierMergeError unless a path is a regular file that lies in a folder.

    Links inside the folder are followed, and those into the hub's cache, which holds nothing but
    what was fetched from it. A link elsewhere could give away a file that is no model's.
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
        max_bytes: what it may hold; by default what files of its name may.

    Raises:
        OutlierMergeError: it is there and cannot be read, is no regular file, or is too large.
    """
    limit = max_bytes or _max_bytes(path)
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            _check_size(path, size, limit)
            # What is read is counted too: files grow, and some have no size to tell.
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
    """Return the bytes of a small file that has to be there.

    Raises:
        OutlierMergeError: as for read_bytes, or it is not there.
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
    """Return what a JSON file holds, or None where there is no such file.

    Raises:
        OutlierMergeError: it is there and no JSON that loaders take: what was found, and where.
    """
    data = read_bytes(path)
    if data is None:
        return None
    try:
        # The tokenizers library reads this one; Python's parser the others.
        return parse_json(
            data,
            infinite=path.name != "tokenizer.json",
            max_values=MAX_VALUES if _LARGE.search(path.name) else MAX_SMALL_VALUES,
        )
    except ValueError as error:
        raise OutlierMergeError(f"{path}: {error}") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there as a whole or not at all; a link stays one to what is written.

    Raises:
        OutlierMergeError: there is no such folder.
        OSError: it cannot be written.
    """
    if not path.parent.is_dir():
        raise OutlierMergeError(f"{path}: cannot be written: there is no folder {path.parent}")
    path = path.resolve()
    if path.exists() and not path.is_file():  # a pipe or a device is written to, not replaced
        path.write_bytes(content)
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
