"""Which existing files an analysis may replace: its own earlier results, and nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from outliermerge.checkpoint.folders.folder import MANIFEST_NAME
from outliermerge.errors import OutlierMergeError
from outliermerge.output.names import as_local
from outliermerge.storage.failures import naming

Kind = Literal["page", "json", "csv", "parquet", "png", "markdown"]

GENERATOR = "outliermerge"
"""What our pages and pictures name as the software that made them."""

_HEAD_BYTES, _MAX_JSON_BYTES = 4096, 1 << 28
_COLUMNS = ("name", "layer", "module", "shape", "num_elements")
_JSON_KEYS = (
    {"model", "base", "filter", "tensors"},
    {"models", "verdict", "pairs", "tensors"},
    {"models", "fingerprint_distances"},
    {"seed", "num_points", "weights"},
)


def writable(named: str | Path, kind: Kind) -> Path:
    """Return the path that names a file which may be written.

    It is refused if what is there is no earlier file of the kind, or is inside a model. An empty
    file, a pipe and a device may be written to.

    Raises:
        ArgumentError: it is an address.
        OutlierMergeError: the file must not be replaced, or its folder is absent.
    """
    path = as_local(named)
    if path.is_dir() or not path.parent.is_dir():
        what = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise OutlierMergeError(f"{path}: cannot be written: {what}")
    real = Path(os.path.realpath(path))
    if not real.is_file() or not real.stat().st_size:
        return path
    folder = real.parent
    if holder := next((name for name in _OF_MODELS if (folder / name).is_file()), None):
        raise OutlierMergeError(
            f"{real}: exists, and is in the folder of a model (there is a {holder}), where nothing "
            "is replaced. Name a file elsewhere."
        )
    what, is_ours = _KINDS[kind]
    with naming(real, "read"):
        if is_ours(real):
            return path
    raise OutlierMergeError(
        f"{real}: exists, and is not {what} by outliermerge, so it is not replaced. Move it away, "
        "or name another file."
    )


_OF_MODELS = (MANIFEST_NAME, "config.json", "adapter_config.json", "model_index.json")


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD_BYTES)


def _is_page(path: Path) -> bool:
    return f'<meta name="generator" content="{GENERATOR}">'.encode() in _head(path)


def _is_json(path: Path) -> bool:
    if path.stat().st_size > _MAX_JSON_BYTES:
        return False
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and any(keys <= found.keys() for keys in _JSON_KEYS)


def _is_csv(path: Path) -> bool:
    return _head(path).startswith(",".join(_COLUMNS).encode())


def _is_parquet(path: Path) -> bool:
    from pyarrow import ArrowInvalid, parquet

    try:
        return tuple(parquet.read_schema(path).names[: len(_COLUMNS)]) == _COLUMNS
    except ArrowInvalid:
        return False


def _is_png(path: Path) -> bool:
    head = _head(path)
    return head.startswith(b"\x89PNG") and f"Software\0{GENERATOR}".encode() in head


def _is_markdown(path: Path) -> bool:
    return _head(path).startswith(b"| model ")


_KINDS: dict[Kind, tuple[str, Callable[[Path], bool]]] = {
    "page": ("a report", _is_page),
    "json": ("a table in JSON", _is_json),
    "csv": ("a table in CSV", _is_csv),
    "parquet": ("a table in Parquet", _is_parquet),
    "png": ("a figure", _is_png),
    "markdown": ("a table of scores", _is_markdown),
}
