"""The table of file formats that weights are read from; a new one has its file and a line here."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.sources import TensorMeta
from outliermerge.optional import require_torch


@dataclass(frozen=True)
class Format:
    """A format of files of tensors.

    Attributes:
        module: of this folder. Its `read_file` takes a path and returns the file's tensors, notes
            on how they were read, and the texts that its header has beside them.
        suffixes: of its files. Of a folder without a file that a loader knows by its name, those
            of one format are read.
        alone: suffixes of files that are read only where a file is named itself as a model.
        needs_torch: whether torch reads them.
    """

    module: str
    suffixes: tuple[str, ...]
    alone: tuple[str, ...] = ()
    needs_torch: bool = False


FORMATS = (
    Format("safetensors_file", (".safetensors",)),
    Format("pytorch_file", (".bin", ".pt", ".pth"), needs_torch=True, alone=(".ckpt",)),
    Format("gguf_file", (), needs_torch=True, alone=(".gguf",)),
)
"""The formats, the preferred one first."""

SUFFIXES = tuple(suffix for known in FORMATS for suffix in (*known.suffixes, *known.alone))
PATTERNS = ", ".join(f"*{suffix}" for known in FORMATS for suffix in known.suffixes)
"""What a folder's weights are named like, for messages."""


def read_file(path: Path) -> tuple[list[TensorMeta], list[str], dict[str, str]]:
    """Return a file's tensors, notes on how they were read, and its header's other texts.

    A file of another suffix, which an index may name, is read as the first format.

    Raises:
        OutlierMergeError: the file is broken or dangerous, or needs torch, which is not installed.
    """
    fitting = (known for known in FORMATS if path.suffix in (*known.suffixes, *known.alone))
    format = next(fitting, FORMATS[0])
    if format.needs_torch:
        require_torch(f"reading {path}")
    module: Any = importlib.import_module(f"outliermerge.checkpoint.formats.{format.module}")
    found: tuple[list[TensorMeta], list[str], dict[str, str]] = module.read_file(path)
    return found
