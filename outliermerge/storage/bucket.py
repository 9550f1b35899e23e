"""A folder in S3, Google Cloud Storage or Azure that is written; an object appears whole or not.

Requests that fail in a way that may pass are made again by obstore, with growing waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from outliermerge.errors import OutlierMergeError
from outliermerge.storage import ranges
from outliermerge.storage.ranges import State
from outliermerge.storage.store_objects import advice_on, lasting, open_store, state_of, words_of

PART_BYTES, NUM_AT_ONCE = 16 << 20, 8  # of an upload in parts; both are held in memory
UPLOAD_BYTES = PART_BYTES * NUM_AT_ONCE
_MOST_PARTS = 9_000  # S3 takes 10,000
_TIMEOUT_STALLS, _RETRY_SECONDS = 4, 600


class Bucket:
    """A folder of a store, whose objects have names inside it.

    Every method raises OutlierMergeError where the store refuses, or does not answer for long.

    Args:
        address: of the folder, such as s3://bucket/merged.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        waits = ranges.FIRST_WAIT_SECONDS, ranges.LONGEST_WAIT_SECONDS
        self._root, self._store = open_store(
            address,
            timeout_seconds=_TIMEOUT_STALLS * ranges.STALL_SECONDS,
            retry_config={
                "max_retries": ranges.NUM_TRIES - 1,
                "retry_timeout": timedelta(seconds=_RETRY_SECONDS),
                "backoff": {
                    "init_backoff": timedelta(seconds=waits[0]),
                    "max_backoff": timedelta(seconds=waits[1]),
                    "base": 2,
                },
            },
        )
        self._folder = address.removeprefix(self._root).strip("/") + "/"

    def states(self) -> dict[str, State]:
        """Return the objects of the folder, and of folders in it, with their states."""
        import obstore

        with self._telling("listed"):
            found = obstore.list(self._store, prefix=self._folder)
            return {
                meta["path"].removeprefix(self._folder): _plain(state_of(meta))
                for some in found
                for meta in some
                if meta["path"] != self._folder.rstrip("/")  # what shows a folder in a console
            }

    def parent_with(self, name: str) -> str | None:
        """Return the address of a folder around this one that has an object of a name."""
        import obstore
        from obstore.exceptions import PermissionDeniedError

        parts = self._folder.rstrip("/").split("/")[:-1]
        for number in range(len(parts) + 1):
            where = "/".join([*parts[:number], name])
            with self._telling("listed"), suppress(FileNotFoundError, PermissionDeniedError):
                obstore.head(self._store, where)
                return f"{self._root}/{where.removesuffix(name)}"
        return None

    def get(self, name: str) -> bytes | None:
        """Return an object; None if there is none."""
        import obstore

        with self._telling("read", name):
            try:
                return bytes(obstore.get(self._store, self._folder + name).bytes())
            except FileNotFoundError:
                return None

    def read(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` from an object, from a position on."""
        import obstore

        with self._telling("read back", name):
            where = self._folder + name
            content = obstore.get_range(self._store, where, start=start, length=len(out))
            out[:] = memoryview(content)

    def put(self, name: str, content: bytes | Path, *, new: bool = False) -> bool:
        """Write an object from memory or from a file; False if it had to be new, and is not."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        with self._telling("written", name):
            try:
                obstore.put(
                    self._store,
                    self._folder + name,
                    content,
                    mode="create" if new else "overwrite",
                    chunk_size=PART_BYTES,
                    max_concurrency=NUM_AT_ONCE,
                )
            except (AlreadyExistsError, PreconditionError):
                return False
        return True

    def put_stream(self, name: str, chunks: Iterable[bytearray], num_bytes: int) -> State:
        """Write an object of a known size from chunks, in parts; return its state.

        If taking a chunk fails, the upload is aborted, and the error is raised.
        """
        import obstore

        with self._telling("written", name):
            obstore.put(
                self._store,
                self._folder + name,
                iter(chunks),
                use_multipart=True,
                chunk_size=max(PART_BYTES, -(-num_bytes // _MOST_PARTS)),
                max_concurrency=NUM_AT_ONCE,
            )
            return _plain(state_of(obstore.head(self._store, self._folder + name)))

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects; those that are not there are none."""
        import obstore

        keys = [self._folder + name for name in names]
        with self._telling("removed"):
            try:
                obstore.delete(self._store, keys)
            except FileNotFoundError:  # some stores end at one that is not there
                for key in keys:
                    with suppress(FileNotFoundError):
                        obstore.delete(self._store, key)

    @contextmanager
    def _telling(self, what: str, name: str = "") -> Iterator[None]:
        """Turn obstore's errors into ours."""
        where = f"{self.address.rstrip('/')}/{name}".rstrip("/")
        try:
            yield
        except OutlierMergeError:
            raise
        except Exception as error:
            if lasting(error):
                raise OutlierMergeError(
                    f"{where}: cannot be {what}: {words_of(error)}. {advice_on(error)}"
                ) from None
            raise OutlierMergeError(
                f"{where}: cannot be {what}: {words_of(error)}. Is the network there? The same "
                "command goes on later."
            ) from None


def _plain(state: State) -> State:
    """Return a state as all answers have it: some stores quote ETags in headers, not in lists."""
    return replace(state, version=state.version.strip('"'))
