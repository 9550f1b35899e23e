"""Opens objects by their addresses."""

from __future__ import annotations

import threading

from outliermerge.storage.addresses import STORES, is_address
from outliermerge.storage.http_objects import HttpClient, HttpObject
from outliermerge.storage.hub_token import hub_token
from outliermerge.storage.ranges import RemoteObject
from outliermerge.storage.store_objects import Store


class Objects:
    """Opens objects; buckets are opened, and connections made, once for all of them."""

    def __init__(self) -> None:
        self._client = HttpClient()
        self._stores: list[Store] = []
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the connections, which nobody uses any more."""
        self._client.close()

    def store(self, address: str) -> Store:
        """Return the bucket that an address is in."""
        with self._lock:
            for store in self._stores:
                if f"{address}/".startswith(f"{store.root}/"):
                    return store
            self._stores.append(Store(address))
            return self._stores[-1]

    def open(self, address: str) -> RemoteObject:
        """Return the object at an address; nothing is asked for yet.

        Raises:
            OutlierMergeError: its store needs a package that is not installed.
        """
        assert is_address(address)
        if address.partition("://")[0].lower() in STORES:
            return self.store(address).object(address)
        if headers := _hub_headers(address):
            return HttpObject(address, self._client, headers, is_fixed=True)
        return HttpObject(address, self._client)


def _hub_headers(address: str) -> dict[str, str]:
    """Return what the hub's own client sends with a request, the token too; {} elsewhere."""
    from huggingface_hub import constants

    # Documented as public, but not marked so for type checkers.
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    if not address.startswith(f"{constants.ENDPOINT}/") or "/resolve/" not in address:
        return {}
    hub_token()  # refuses what would be no header
    found: dict[str, str] = build_hf_headers(library_name="outliermerge")
    return found
