"""The paths of an output and of the files that belong to it."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TypeAlias

from outliermerge.checkpoint.folders.folder import MANIFEST_NAME
from outliermerge.checkpoint.folders.hub import resolve
from outliermerge.errors import ArgumentError, OutlierMergeError, as_path, shown
from outliermerge.storage.addresses import STORES, is_address, without_secrets

Final: TypeAlias = Path | str
"""Where an output is in the end: a path of this machine, or the address of a folder in a store."""

_LONGEST = ".partial.journal"
_LONGEST_KEY = 900  # bytes; an object's name has at most 1,024, and files have names in the folder
_ANY_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # no drive, which has one letter


def partial_folder(final: Path) -> Path:
    """Return the folder in which an output is written before it has its final name."""
    return final.with_name(final.name + ".partial")


def journal_path(final: Path, part: str = "") -> Path:
    """Return the path of the journal of an output, or of a part of it."""
    return final.with_name(final.name + _LONGEST + (f".{part}" if part else ""))


def replaced_path(final: Path) -> Path:
    """Return where an old output is kept for a moment, if a system cannot exchange two names."""
    return final.with_name(final.name + ".replaced")


def manifest_path(final: Path) -> Path:
    """Return the path of an output's manifest: in its folder, or beside its file."""
    final = Path(os.path.realpath(final)) if final.is_symlink() else final
    if final.suffix == ".safetensors" and not final.is_dir():
        return final.with_name(f"{final.name}.{MANIFEST_NAME}")
    return final / MANIFEST_NAME


def output_here(named: str | Path, file: str = "") -> Path:
    """Return the path of an output: of one that is elsewhere, that of its private folder.

    Args:
        file: the only file of it that is wanted; all, of weights the headers, without it.

    Raises:
        OutlierMergeError: it is elsewhere, and cannot be read.
    """
    if isinstance(named, str) and is_address(named):
        return resolve(without_secrets(named), lambda name: name == file or not file)
    return as_path(named)


def shard_path(final: Path, file: str) -> Path:
    """Return the path of a shard: in the output's folder, or the output itself."""
    return final / file if final.is_dir() else final


def as_final(named: Final) -> Final:
    """Return the path or the address that names an output.

    Raises:
        ArgumentError: nothing is written to such an address.
        OutlierMergeError: no file can have that name.
    """
    if isinstance(named, str) and is_address(named):
        return _address(named)
    if _ANY_SCHEME.match(str(named)):  # also of an address that was made a path, as `s3:/bucket`
        raise ArgumentError(
            f"output {without_secrets(str(named))}: is no address that an output can have. Write "
            "to a store as the text s3://bucket/name (or gs://, az://), or name a folder; one "
            "whose name begins so by its whole path"
        )
    return as_path(named)


def as_local(named: Final, what: str = "it is written to this machine") -> Path:
    """Return the path that names what is written to this machine alone.

    Args:
        what: says so, in an error.

    Raises:
        ArgumentError: it is an address.
        OutlierMergeError: no file can have that name.
    """
    if _ANY_SCHEME.match(str(named)):
        raise ArgumentError(
            f"output {without_secrets(str(named))}: {what}, and this is an address: name a path"
        )
    return as_path(named)


def _address(named: str) -> str:
    """Return the address of an output in a store.

    Raises:
        ArgumentError: nothing is written to such an address.
    """
    address = without_secrets(named).rstrip("/")
    scheme, _, rest = address.partition("://")
    bucket, _, folder = rest.partition("/")
    if scheme.lower() == "hf":
        raise ArgumentError(
            f"output {address}: nothing is written to the hub directly: write a folder, and "
            "`outliermerge push` it"
        )
    if scheme.lower() not in STORES:
        raise ArgumentError(
            f"output {address}: a web server takes no outputs: write a folder, or to a store "
            "(s3://, gs://, az://)"
        )
    if "@" in bucket or address != named.rstrip("/"):
        raise ArgumentError(
            f"output {address}: keys are no part of it: they are taken from the environment "
            "(AWS_…, GOOGLE_…, AZURE_…)"
        )
    if not folder or "?" in folder or "#" in folder or "" in folder.split("/"):
        raise ArgumentError(
            f"output {address}: expected a folder of a bucket: {scheme}://bucket/name"
        )
    if any(part in (".", "..") for part in folder.split("/")):
        raise ArgumentError(f"output {address}: a store has no folders `.` and `..`")
    if not folder.isprintable():
        raise ArgumentError(f"output {shown(address)}: has characters that cannot be printed")
    if len(folder.encode()) > _LONGEST_KEY:
        raise ArgumentError(
            f"output {address[:60]}…: its name has {len(folder.encode()):,} bytes, and at most "
            f"{_LONGEST_KEY} leave room for the names of its files"
        )
    return f"{scheme.lower()}://{rest}"


def real_output(named: Path) -> Path:
    """Return the path that an output's name leads to: links are followed, and stay.

    A name without links stays as it is, so that messages name what the user named.

    Raises:
        OutlierMergeError: an output cannot have that name.
    """
    real = Path(os.path.realpath(named))
    if os.path.lexists(named) and not named.exists():
        raise OutlierMergeError(
            f"{named}: is a link to {real}, which is not there. Remove the link, or make what it "
            "leads to."
        )
    if not real.name:
        raise OutlierMergeError(f"{named}: cannot be an output. Name a new folder in it.")
    try:
        length = len(real.name.encode()) + len(_LONGEST)
    except UnicodeEncodeError as error:
        raise OutlierMergeError(
            f"{os.fsencode(named)!r}: cannot be an output: its name is not UTF-8, which "
            "safetensors' readers and the hub need"
        ) from error
    if length > 255:
        raise OutlierMergeError(
            f"{real.name[:60]}…: cannot be an output: its name has {length - len(_LONGEST)} bytes, "
            f"and at most {255 - len(_LONGEST)} leave room for {_LONGEST}"
        )
    # `resolve` would follow links.
    is_plain = named.name == real.name and os.path.abspath(named) == str(real)  # noqa: PTH100
    return named if is_plain else real


def real_final(named: Final) -> Final:
    """Return the path that an output's name leads to, or its address."""
    return named if isinstance(named, str) else real_output(named)


def free_disk_bytes(folder: Path) -> int:
    """Return the free bytes of the disk of a folder, which need not exist yet."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
