"""Files that stand for objects which are elsewhere: their first bytes, up to the tensors.

A model that is elsewhere has a private folder in our cache, with its small files, and for each
file of weights one with no more than its header. So all that looks at a model's folder sees one,
and whoever would read weights there without asking the object's server finds that the file ends.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from outliermerge.errors import OutlierMergeError
from outliermerge.storage.addresses import inside
from outliermerge.storage.machine import cache_folder

_RECORD = "objects.json"


@dataclass(frozen=True, slots=True)
class StandIn:
    """What a file stands for.

    Attributes:
        address: where the object is.
        num_bytes: its size.
        version: its ETag or time; "" if its server gives none.
    """

    address: str
    num_bytes: int
    version: str


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A model that is elsewhere, and what is known of it.

    Attributes:
        address: of the model.
        version: of the model as a whole, such as a commit of the hub; "" if there is none.
        names: all files that it has, where they are listed.
        files: what its files of weights stand for, by name.
    """

    address: str
    version: str
    names: tuple[str, ...]
    files: Mapping[str, StandIn]


def private_folder(key: str = "") -> Path:
    """Return the folder for models that are elsewhere, or for the one with a key."""
    return cache_folder("remote") / key


def elsewhere(path: Path) -> Elsewhere | None:
    """Return what is known of the model in whose private folder a path is; None if in none."""
    home = _home(path)
    if home is None:
        return None
    try:
        status = (home / _RECORD).stat()
        return _recorded(home / _RECORD, status.st_ino, status.st_mtime_ns)
    except (OSError, ValueError, KeyError, TypeError):
        return None


@lru_cache(maxsize=64)
def _recorded(path: Path, inode: int, mtime_ns: int) -> Elsewhere:
    """Read a record, which is asked for each file of a model."""
    record: Any = json.loads(path.read_text("utf-8"))
    files = {name: StandIn(**entry) for name, entry in record["files"].items()}
    return Elsewhere(record["address"], record["version"], tuple(record["names"]), files)


def all_elsewhere(paths: Iterable[Path]) -> list[Elsewhere]:
    """Return what is known of the models in whose private folders paths are, of each once."""
    by_home = {_home(path): path for path in paths}
    found = (elsewhere(path) for home, path in by_home.items() if home is not None)
    return [model for model in found if model is not None]


def stand_in(path: Path) -> StandIn | None:
    """Return what a file stands for; None for one that has all its bytes."""
    found = elsewhere(path)
    if found is None:
        return None
    home = _home(path)
    assert home is not None
    return found.files.get("/".join(path.relative_to(home).parts[1:]))


def with_addresses(text: str) -> str:
    """Return a text with the addresses of models in place of their private folders here."""
    place = rf"{re.escape(str(private_folder()))}{re.escape(os.sep)}[0-9a-f]+/[\w.@-]*[\w@-]"
    return re.sub(rf"({place})((?:/[^\s:;,'\"]+)?)", _addressed, text)


def _addressed(found: re.Match[str]) -> str:
    model = elsewhere(Path(found[1]))
    if model is None:
        return found[0]
    name = found[2].strip("/").rstrip(".")
    if name in model.files:
        address = model.files[name].address
    else:
        address = inside(model.address, name) if name else model.address
    return address + found[2][len(found[2].rstrip(".")) :]


@contextmanager
def naming_addresses() -> Iterator[None]:
    """Name models by their addresses in errors of what looks at their private folders here.

    Raises:
        OutlierMergeError: instead of another.
    """
    try:
        yield
    except OutlierMergeError as error:
        text = with_addresses(error.marked)
        if type(error) is not OutlierMergeError or text == error.marked:
            raise
        raise OutlierMergeError(text) from error


def true_size(path: Path, num_bytes: int) -> int:
    """Return the size of a file, or of the object that it stands for."""
    found = stand_in(path)
    return num_bytes if found is None else found.num_bytes


def write_record(home: Path, model: Elsewhere) -> None:
    """Write what is known of a model beside its private folder."""
    (home / _RECORD).write_text(json.dumps(asdict(model)), "utf-8")


def _home(path: Path) -> Path | None:
    folder = str(private_folder())
    if not str(path).startswith(folder + os.sep):
        return None
    return Path(folder) / str(path)[len(folder) + 1 :].partition(os.sep)[0]
