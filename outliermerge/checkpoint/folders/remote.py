"""Models that are elsewhere: small files are fetched, and stand-ins made for the weights."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal

import xxhash

from outliermerge.checkpoint.checksum import file_checksum
from outliermerge.checkpoint.folders.beside import CARD_NAME, MANIFEST_NAME
from outliermerge.checkpoint.folders.chosen import wanted_files
from outliermerge.checkpoint.formats.safetensors_file import MAX_HEADER_BYTES
from outliermerge.checkpoint.formats.table import SUFFIXES
from outliermerge.errors import OutlierMergeError, listing, quoted
from outliermerge.storage.addresses import STORES, file_name, inside
from outliermerge.storage.failures import naming
from outliermerge.storage.files import MAX_LARGE_BYTES, MAX_MANIFEST_BYTES
from outliermerge.storage.json_text import is_web_page, parse_json
from outliermerge.storage.objects import Objects
from outliermerge.storage.ranges import RefusedError, RemoteObject, State, persistently
from outliermerge.storage.stamps import Watched, watching
from outliermerge.storage.stand_ins import (
    Elsewhere,
    StandIn,
    elsewhere,
    private_folder,
    write_record,
)

_LOGGER = logging.getLogger(__name__)
_BY_RANGES = ".safetensors"
_FIRST_BYTES = 1 << 18  # most headers of a shard, and most small files, fit
_NUM_CONNECTIONS = 8
# Web servers do not list their folders: these names are asked for.
_USUAL_NAMES = (
    "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json",
    "adapter_config.json", "adapter_model.safetensors", "model_index.json", "modules.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
    "processor_config.json", "LICENSE", CARD_NAME, MANIFEST_NAME,
)  # fmt: skip

RECORDS = ".outliermerge/"
"""The folder in an output in a store that is there until the output is finished."""

Streamed = Literal["", "headers", "all", "only"]
"""What is read by ranges of models which a hub id names: nothing, their headers, or the weights.

`only` refuses models of the user's own folders, too.
"""
_STREAMED: ContextVar[Streamed] = ContextVar("_STREAMED", default="")


@contextmanager
def streaming(what: Streamed) -> Iterator[None]:
    """Read models of the hub by ranges where they are opened inside the block.

    Where only headers are needed, a model that cannot be read so is downloaded.
    """
    token = _STREAMED.set(what)
    try:
        yield
    finally:
        _STREAMED.reset(token)


def streamed() -> Streamed:
    """Return what is read by ranges of models which a hub id names."""
    return _STREAMED.get()


@dataclass(frozen=True)
class Place:
    """Where a model is.

    Attributes:
        address: of the model, as it is shown.
        address_of: returns the address of a file of it.
        names: its files; None if nothing lists them.
        version: of the whole, such as a commit; "" if each file has a version of its own only.
        file: the name of the one file that the model is, if it is not a folder.
    """

    address: str
    address_of: Callable[[str], str]
    names: tuple[str, ...] | None
    version: str = ""
    file: str = ""


def place_of(address: str) -> Place:
    """Return the place of a model in a store or on a web server.

    Raises:
        OutlierMergeError: it cannot be listed, or is empty.
    """
    try:
        name = file_name(address)
    except ValueError as error:
        raise OutlierMergeError(f"{address}: is no valid address: {error}") from error
    if name.endswith(SUFFIXES):
        return Place(address, lambda name: address, (name,), file=name)
    names: tuple[str, ...] | None = None
    if address.partition("://")[0].lower() in STORES:
        store = Objects().store(address)
        # Keys may allow to read, but not to list: then the usual names are asked for.
        with suppress(RefusedError):
            names = tuple(sorted(persistently(address, lambda: list(store.names(address)))))
        if names == ():
            raise OutlierMergeError(f"{address}: nothing is there")
        is_begun = any(name.startswith(RECORDS) for name in names or ())
        if is_begun and MANIFEST_NAME not in (names or ()):
            raise OutlierMergeError(
                f"{address}: is an output that is not finished: its weights are not all written. "
                "To go on, start the same command again."
            )
    return Place(address, partial(inside, address), names)


def fetch_model(place: Place, only: Callable[[str], bool] | None = None) -> Path:
    """Return a private folder with a model's small files, and stand-ins for its weights.

    Args:
        only: tells by their names which files are wanted, instead of those of a model.

    Raises:
        OutlierMergeError: it has no weights, or they cannot be read by ranges.
    """
    home = private_folder()
    with naming(home, "written"):
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        new = tempfile.TemporaryDirectory(dir=home, prefix=".new-")
    # What is looked at there is at another place afterwards: no plan is to find it unchanged.
    with naming(home, "written"), new as folder, watching(Watched()):
        fetch = _Fetch(place, Path(folder))
        try:
            return fetch.run(only)
        except OutlierMergeError as error:
            text = error.marked.replace(f"{fetch.folder}/", "")
            if text == error.marked:
                raise
            raise OutlierMergeError(text) from error
        finally:
            fetch.objects.close()


class _Fetch:
    """Fetches files of a model into a folder, each once."""

    def __init__(self, place: Place, new: Path) -> None:
        self._place, self._new = place, new
        self._name = "".join(c for c in file_name(place.address) if c.isalnum() or c in "-_.@")
        self._name = self._name.strip(".") or "model"
        self.folder = new / self._name
        self.folder.mkdir()
        self.objects = Objects()
        self._firsts: dict[str, tuple[State, bytes] | None] = {}
        self._states: dict[str, State] = {}
        self._refused: dict[str, RefusedError] = {}

    def run(self, only: Callable[[str], bool] | None) -> Path:
        place = self._place
        names = list(place.names if place.names is not None else self._asked_for())
        if only is not None:
            wanted = [*filter(only, names)]
        elif place.file:
            wanted = names
        else:
            try:
                wanted = wanted_files(names, self._fetch)
                wanted += [name for name in names if name in (CARD_NAME, MANIFEST_NAME)]
            except OutlierMergeError as error:
                raise OutlierMergeError(f"{place.address}: {error}") from error
        others = [n for n in wanted if n.endswith(SUFFIXES) and not n.endswith(_BY_RANGES)]
        if others:
            raise OutlierMergeError(
                f"{place.address}: only safetensors are read by ranges, and the weights are:\n"
                f"{listing(others)}\nFetch the model to a folder, and name that."
            )
        self._fetch(wanted)
        return self._moved(names) / place.file

    def _asked_for(self) -> list[str]:
        """Return which of the usual files a web server has, and those that a manifest names."""
        with ThreadPoolExecutor(_NUM_CONNECTIONS) as pool:
            found = zip(_USUAL_NAMES, pool.map(self._if_there, _USUAL_NAMES), strict=True)
            # Some servers answer with a page, and not with 404, where a file is not there.
            names = [n for n, first in found if first is not None and not is_web_page(first[1])]
        if self._refused:
            self._settle_refused(names)
        if not names:
            raise OutlierMergeError(
                f"{self._place.address}: no model is there: the server has none of "
                f"{', '.join(_USUAL_NAMES[:4])}, …"
            )
        if MANIFEST_NAME in names:
            manifest = parse_json((self._fetch([MANIFEST_NAME]) / MANIFEST_NAME).read_bytes())
            named = [manifest.get(key) for key in ("files", "shards")]
            names += [n for part in named if isinstance(part, dict) for n in part if n not in names]
        return names

    def _if_there(self, name: str) -> tuple[State, bytes] | None:
        try:
            return self._first(name)
        except RefusedError as error:
            self._refused[name] = error
            return None

    def _settle_refused(self, found: Sequence[str]) -> None:
        """Take files that are refused for absent: stores that may not be listed answer so.

        Raises:
            OutlierMergeError: all are refused, also those that were read a moment ago.
        """
        name, error = next(iter(self._refused.items()))
        if not found:
            raise error
        there = self._object(found[0])
        persistently(there.address, partial(there.first, 1))
        _LOGGER.warning(
            "%s: the server refuses %d of the usual files (403), such as %s: they are taken to be "
            "absent, as stores that may not be listed say so",
            self._place.address,
            len(self._refused),
            name,
        )

    def _first(self, name: str) -> tuple[State, bytes] | None:
        if name not in self._firsts:
            found = self._object(name)
            self._firsts[name] = persistently(found.address, partial(found.first, _FIRST_BYTES))
        return self._firsts[name]

    def _object(self, name: str) -> RemoteObject:
        return self.objects.open(self._place.address_of(name))

    def _fetch(self, names: Sequence[str]) -> Path:
        """Fetch files that are not there yet, whole or up to the tensors; return the folder."""
        missing = [name for name in dict.fromkeys(names) if name not in self._states]
        with ThreadPoolExecutor(_NUM_CONNECTIONS) as pool:
            list(pool.map(self._save, missing))
        return self.folder

    def _save(self, name: str) -> None:
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or parts[0] == "/" or "\\" in name or "\0" in name:
            raise OutlierMergeError(
                f"{self._place.address}: names a file {quoted(name)}, which leads out of its folder"
            )
        found, first = self._object(name), self._first(name)
        if first is None:
            raise OutlierMergeError(f"{found.address}: is not there")
        state, content = first
        num_bytes = state.num_bytes
        if name.endswith(_BY_RANGES):
            length = 8 + int.from_bytes(content[:8], "little")
            num_bytes = min(length if length <= MAX_HEADER_BYTES else len(content), num_bytes)
        elif num_bytes > (MAX_MANIFEST_BYTES if name.endswith(MANIFEST_NAME) else MAX_LARGE_BYTES):
            raise OutlierMergeError(
                f"{found.address}: has {num_bytes:,} bytes, more than a file beside weights has"
            )
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)

        with path.open("wb") as file:
            file.write(content[:num_bytes])

            def write(data: memoryview) -> None:
                with naming(path, "written"):
                    file.write(data)

            def rest() -> None:
                file.seek(len(content))
                found.read(len(content), num_bytes, state, write)

            if num_bytes > len(content):
                persistently(found.address, rest)
        if name.endswith(_BY_RANGES):
            os.utime(path, (0, 0))  # a run that goes on finds the file as it was
        self._states[name], self._firsts[name] = state, (state, b"")  # it is on the disk now

    def _moved(self, names: Sequence[str]) -> Path:
        """Give the folder the name that belongs to what is in it."""
        place, states = self._place, sorted(self._states.items())
        # Where a server gives no version, only the contents show that a file was written again.
        contents = [file_checksum(self.folder / name) for name, _ in states]
        facts = repr((place.address, place.version, states, contents))
        final = private_folder(xxhash.xxh3_128_hexdigest(facts.encode("utf-8", "surrogatepass")))
        if elsewhere(final / self._name) is None:
            files = {
                name: StandIn(place.address_of(name), state.num_bytes, state.version)
                for name, state in states
                if name.endswith(_BY_RANGES)
            }
            listed = tuple(names) if place.names is not None else ()
            write_record(self._new, Elsewhere(place.address, place.version, listed, files))
            ready = self._new.with_name(f".{final.name}-{os.getpid()}")
            self._new.rename(ready)
            self._new.mkdir()  # for who removes it
            try:
                ready.rename(final)
            except OSError:  # another process was faster, or what is there is damaged
                if elsewhere(final / self._name) is None:
                    shutil.rmtree(final, ignore_errors=True)
                    ready.rename(final)
                else:
                    shutil.rmtree(ready)
        return final / self._name
