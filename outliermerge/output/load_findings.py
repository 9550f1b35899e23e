"""Findings of earlier load checks, so that a `run` after a `plan` does not ask the same again.

What a class says of a config and of tensors' names and shapes depends on these and on the installed
packages alone. Only findings on models that could be built are kept: what stands in the way of
building one, such as too little memory, may pass.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import xxhash

from outliermerge.storage.machine import cache_folder

Findings: TypeAlias = Mapping[str, Any]
"""What load_worker.check_part returns."""
Pair: TypeAlias = tuple[Findings, Findings | None]
"""The findings on a part of an output, and on the same part of its base where that was asked."""

_MOST_FILES, _MOST_BYTES = 64, 1 << 20
_LIBRARIES = ("transformers", "diffusers")


class KeptFindings:
    """A folder with the latest findings, each in a file that is named by what was asked of whom."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        with suppress(OSError, RuntimeError):  # such as no home folder
            self._asked = _asked()
            self._folder = cache_folder("load_checks") if self._asked else None

    def find(self, requests: Iterable[str]) -> dict[str, Pair]:
        """Return what is kept of requests; files that are damaged count as none."""
        found: dict[str, Pair] = {}
        for request in requests if self._folder is not None else ():
            if not self._path(request).is_file():  # nor a pipe, which could be waited for
                continue
            with suppress(OSError, ValueError):
                with self._path(request).open("rb") as file:
                    checksum, _, answer = file.read(_MOST_BYTES).partition(b"\n")
                if checksum == _digest(answer).encode():
                    ours, of_base = json.loads(answer)
                    found[request] = ours, of_base
        return found

    def keep(self, request: str, pair: Pair) -> bool:
        """Keep findings on a model that could be built; tell whether they are kept."""
        answer = json.dumps(pair).encode()
        built = all("by" in found for found in pair if found is not None)
        if self._folder is None or not built or len(answer) > _MOST_BYTES - 100:
            return False
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(_digest(answer).encode() + b"\n" + answer)
                Path(name).replace(self._path(request))
            except BaseException:
                Path(name).unlink()
                raise
            latest = sorted(self._folder.iterdir(), key=lambda path: -path.stat().st_mtime_ns)
            for path in latest[_MOST_FILES:]:
                path.unlink()
        except OSError:
            return False
        return True

    def _path(self, request: str) -> Path:
        assert self._folder is not None
        return self._folder / _digest(self._asked + request.encode())


def _asked() -> bytes:
    """Return what answers depend on besides the request; empty if nothing shows that it changed.

    The names of installed packages have their versions; the time of their folders changes if a
    package is installed again, such as one of a version in development. The first of two packages
    is imported. A library that is used from a folder of its sources is not among them.
    """
    places = [Path(place) for place in sys.path if place and Path(place).is_dir()]
    packages = [
        sorted((path.name, path.stat().st_mtime_ns) for path in place.glob("*.dist-info"))
        for place in places
    ]
    for library in _LIBRARIES:
        try:
            spec = find_spec(library)
        except ImportError:  # a hook refuses it
            return b""
        home = Path(spec.origin).parent.parent if spec and spec.origin else None
        if home is not None and not any(home.glob(f"{library}-*.dist-info")):
            return b""
    worker = Path(__file__).with_name("load_worker.py").read_bytes()
    return json.dumps([sys.version, packages]).encode() + worker


def _digest(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)
