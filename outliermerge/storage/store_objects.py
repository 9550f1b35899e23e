"""Objects in S3, Google Cloud Storage and Azure, by the package obstore.

Keys, regions and endpoints are taken from the environment, as obstore documents it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from outliermerge.errors import OutlierMergeError, quoted
from outliermerge.optional import is_installed
from outliermerge.storage import ranges
from outliermerge.storage.addresses import without_secrets
from outliermerge.storage.ranges import (
    RefusedError,
    State,
    TransientError,
    Write,
    changed,
    check_state,
)

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

_MAX_LISTED = 20_000
_PIECE_BYTES = 1 << 20
_ADVICE = "Which keys are used is in the environment (AWS_…, GOOGLE_…, AZURE_…)."
_VENDOR_OF = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}
_ENDPOINT = re.compile("(AWS|AZURE|AZURE_STORAGE)_ENDPOINT(_URL(_S3)?)?")
_YES, _NO = ("1", "true", "on", "yes", "y"), ("0", "false", "off", "no", "n")  # to obstore
_LASTING = re.compile(  # of answers, which obstore has no kinds of errors for
    r"status code: (3\d\d|4(?!08|25|29)\d\d|50[15])|redirect without LOCATION"
    r"|dns error: .*not known"
)


def open_store(
    address: str, *, timeout_seconds: float, retry_config: RetryConfig
) -> tuple[str, Any]:
    """Return the address of the bucket that an address is in, and obstore's object for it.

    Raises:
        OutlierMergeError: obstore is not installed, or the address is wrong.
    """
    if not is_installed("obstore"):
        raise OutlierMergeError(
            f"{address}: needs obstore, which is not installed. Install it: "
            "pip install 'outliermerge[remote]'"
        )
    from obstore.store import from_url

    _check_environment(address)
    scheme, _, rest = address.partition("://")
    root = f"{scheme}://{rest.partition('/')[0]}"
    stalled = timedelta(seconds=ranges.STALL_SECONDS)
    client: ClientConfig = {
        "allow_http": _allows_http(address),
        "timeout": timedelta(seconds=timeout_seconds),
        "connect_timeout": stalled,
    }
    try:
        store = from_url(root, client_options=client, retry_config=retry_config)
    except Exception as error:  # obstore's errors of wrong settings are of several kinds
        raise OutlierMergeError(f"{address}: {words_of(error)}. {_ADVICE}") from error
    return root, store


def _allows_http(address: str) -> bool:
    """Tell whether a store may be asked without TLS: so the environment says, or its endpoint.

    Raises:
        OutlierMergeError: the environment says no, and names such an endpoint.
    """
    vendor = _VENDOR_OF[address.partition("://")[0].lower()]
    plain = [
        name
        for name, value in os.environ.items()
        if _ENDPOINT.fullmatch(name) and value.lower().startswith("http://")
        if name.startswith(f"{vendor}_")
    ]
    variable = f"{vendor}_ALLOW_HTTP"
    said = os.environ.get(variable)
    if said is None:
        return bool(plain)  # who names one means it
    if said.lower() not in (*_YES, *_NO):
        raise OutlierMergeError(
            f"{address}: the environment's {variable} is {quoted(said)}, expected true or false"
        )
    if plain and said.lower() in _NO:
        raise OutlierMergeError(
            f"{address}: the environment's {variable} is {said}, and the endpoint in {plain[0]} "
            f"begins with http://. Name one that begins with https://, or unset {variable}."
        )
    return said.lower() in _YES


def _check_environment(address: str) -> None:
    """Refuse keys with a line's end or the like, at which obstore's client ends in a panic.

    Raises:
        OutlierMergeError: a variable has such a value, which is not shown.
    """
    for name, value in os.environ.items():
        is_key = name.startswith(tuple(f"{vendor}_" for vendor in _VENDOR_OF.values()))
        if is_key and name != "GOOGLE_SERVICE_ACCOUNT_KEY" and re.search(r"[\0-\x1f\x7f]", value):
            raise OutlierMergeError(
                f"{address}: the environment's {name} has a line's end or another control "
                "character, as of a file with Windows' ends of lines. Set it without."
            )


class Store:
    """A bucket, and what is asked of it.

    Raises:
        OutlierMergeError: obstore is not installed, or the address is wrong.
    """

    def __init__(self, address: str) -> None:
        self.root, self._store = open_store(
            address,
            timeout_seconds=8 * ranges.STALL_SECONDS,
            retry_config={
                "max_retries": 0,
                "retry_timeout": timedelta(seconds=ranges.STALL_SECONDS),
            },
        )

    def key(self, address: str) -> str:
        """Return the name of an object in the bucket."""
        return address.removeprefix(self.root).strip("/")

    def names(self, address: str) -> Iterator[str]:
        """Yield the names of the objects in a folder; asks once.

        Raises:
            TransientError: it cannot be listed now.
            OutlierMergeError: it cannot be listed, or has too many.
        """
        import obstore

        prefix, number = self.key(address), 0
        try:
            for found in obstore.list(self._store, prefix=prefix or None):
                for meta in found:
                    number += 1
                    if number > _MAX_LISTED:
                        raise OutlierMergeError(
                            f"{address}: has more than {_MAX_LISTED:,} objects: no model's folder"
                        )
                    yield meta["path"].removeprefix(prefix).lstrip("/")
        except OutlierMergeError:
            raise
        except Exception as error:
            raise _told(address, error) from None

    def object(self, address: str) -> StoreObject:
        """Return an object of the bucket."""
        return StoreObject(address, self._store, self.key(address))


class StoreObject:
    """An object in a bucket."""

    def __init__(self, address: str, store: Any, key: str) -> None:
        self.address, self._store, self._key = address, store, key

    def first(self, num_bytes: int) -> tuple[State, bytes] | None:
        """Return the state and at most so many of its first bytes; None if there is none."""
        import obstore

        try:
            answer = obstore.get(self._store, self._key, options={"range": (0, num_bytes)})
            state = state_of(answer.meta)
            content = bytes(answer.bytes())
        except FileNotFoundError:
            return None
        except Exception as error:
            if "status code: 416" in str(error) and (empty := self._empty()) is not None:
                return empty, b""
            raise _told(self.address, error) from None
        if len(content) != min(num_bytes, state.num_bytes):
            raise TransientError(f"the answer ends after {len(content):,} bytes")
        return state, content

    def _empty(self) -> State | None:
        """Return the state of an object without bytes, of which no range can be had."""
        import obstore

        try:
            state = state_of(obstore.head(self._store, self._key))
        except Exception as error:
            raise _told(self.address, error) from None
        return None if state.num_bytes else state

    def read(self, start: int, stop: int, state: State, write: Write) -> None:
        """Hand the bytes from start to stop (excluded) of a known state to `write`, in order."""
        import obstore
        from obstore.exceptions import PreconditionError

        options: Any = {"range": (start, stop)}
        if state.version.startswith('"'):
            options["if_match"] = state.version
        done = 0
        try:
            answer = obstore.get(self._store, self._key, options=options)
            check_state(self.address, state, state_of(answer.meta))
            if tuple(answer.range) != (start, stop):
                raise TransientError("the store answers with another range")
            for piece in answer.stream(min_chunk_size=_PIECE_BYTES):
                content = memoryview(piece)
                done += len(content)
                if done > stop - start:
                    raise TransientError(f"the answer has more than {stop - start:,} bytes")
                write(content)
        except (TransientError, OutlierMergeError):
            raise
        except PreconditionError:
            raise changed(self.address, f"it has no version {state.version} any more") from None
        except FileNotFoundError:
            raise changed(self.address, "it was removed") from None
        except Exception as error:
            raise _told(self.address, error) from None
        if done < stop - start:
            raise TransientError(f"the answer ends after {done:,} of {stop - start:,} bytes")


def state_of(meta: Any) -> State:
    """Return the state that obstore gives of an object."""
    return State(meta["size"], meta.get("e_tag") or str(meta["last_modified"]))


def lasting(error: Exception) -> bool:
    """Tell whether asking again would give the same error."""
    from obstore import exceptions

    kinds = (
        exceptions.PermissionDeniedError,
        exceptions.UnauthenticatedError,
        exceptions.NotSupportedError,
        exceptions.UnknownConfigurationKeyError,
    )
    return isinstance(error, kinds) or bool(_LASTING.search(words_of(error)))


def words_of(error: Exception) -> str:
    """Return the first line of an error of obstore, without secrets."""
    return without_secrets(str(error)).strip().split("\n")[0][:300].rstrip(":. ")


def advice_on(error: Exception) -> str:
    """Return what to do about an error that asking again does not mend."""
    is_absent = "status code: 404" in words_of(error)
    return f"Is there such a bucket, at that endpoint? {_ADVICE}" if is_absent else _ADVICE


def _told(address: str, error: Exception) -> Exception:
    """Return the error for one of obstore's: whether to ask again, and in whose words."""
    from obstore import exceptions

    text, advice = words_of(error), advice_on(error)
    if isinstance(error, exceptions.PermissionDeniedError) or "status code: 403" in text:
        return RefusedError(f"{address}: cannot be read: {text}. {advice}")
    if lasting(error):
        return OutlierMergeError(f"{address}: cannot be read: {text}. {advice}")
    if isinstance(error, (ValueError, exceptions.InvalidPathError)):  # of a name
        return OutlierMergeError(f"{address}: is no valid address: {text}")
    return TransientError(text)
