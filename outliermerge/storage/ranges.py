"""Byte ranges of files that are elsewhere: what they have in common, and trying again.

An object is a file in a store or on a server. It has a size and a version (its ETag, or else when
it was last written), which every answer must have: so all that is read is of one state of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from outliermerge.errors import OutlierMergeError
from outliermerge.storage.addresses import without_secrets
from outliermerge.storage.stamps import ChangedInputError

T = TypeVar("T")
Write = Callable[[memoryview], object]

NUM_TRIES = 9
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.1, 10.0
STALL_SECONDS = 30.0  # without a byte: then the connection is given up


@dataclass(frozen=True, slots=True)
class State:
    """The size of an object, and its version; "" if its server gives none."""

    num_bytes: int
    version: str


class RemoteObject(Protocol):
    """A file in a store or on a server; each method asks once.

    Attributes:
        address: what is shown of its address.
    """

    @property
    def address(self) -> str: ...
    def first(self, num_bytes: int) -> tuple[State, bytes] | None:
        """Return the state and at most so many of its first bytes; None if there is none."""

    def read(self, start: int, stop: int, state: State, write: Write) -> None:
        """Hand the bytes from start to stop (excluded) of a known state to `write`, in order."""


class TransientError(Exception):
    """A request that failed in a way that may pass, such as a cut connection.

    Attributes:
        wait_seconds: how long the server asks to wait.
    """

    def __init__(self, reason: object, wait_seconds: float = 0.0) -> None:
        super().__init__(without_secrets(str(reason)).strip())
        self.wait_seconds = wait_seconds


class RefusedError(OutlierMergeError):
    """A server that answers 403: it may so hide that there is no such object."""


def persistently(
    address: str, ask: Callable[[], T], *, is_stopped: Callable[[], bool] = lambda: False
) -> T:
    """Return what a request gives, asking again with growing waits where it fails.

    Args:
        address: for the message.
        ask: makes the request once.
        is_stopped: tells that nobody waits for the answer any more.

    Raises:
        OutlierMergeError: it fails for another reason, or too often.
    """
    wait = FIRST_WAIT_SECONDS
    for number in range(1, NUM_TRIES + 1):
        try:
            return ask()
        except TransientError as error:
            if number == NUM_TRIES or is_stopped():
                raise OutlierMergeError(
                    f"{address}: cannot be read: {error}, in {number} tries. Is the network there? "
                    "The same command goes on later."
                ) from None
            time.sleep(min(max(wait, error.wait_seconds), LONGEST_WAIT_SECONDS))
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)
    raise AssertionError


def check_state(address: str, expected: State, found: State) -> None:
    """Raise ChangedInputError if an object is not in the state that was planned with."""
    if found == expected:
        return
    if found.num_bytes != expected.num_bytes:
        what = f"its size changed from {expected.num_bytes:,} to {found.num_bytes:,} bytes"
    else:
        what = f"its version changed from {expected.version} to {found.version or 'none'}"
    raise changed(address, what)


def changed(address: str, what: str) -> ChangedInputError:
    """Return the error for an object that is in another state than the one planned with."""
    return ChangedInputError(
        f"{address}: {what} since the merge was planned: it was written again. Give the command "
        "again when nothing writes to it any more."
    )
