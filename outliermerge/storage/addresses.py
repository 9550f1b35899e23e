"""Addresses of files that are not on this machine, and what in them is secret.

Secrets are taken out of addresses where these come in: in a spec, or on a command line. So nothing
that shows or writes an address later can give one away. What is asked for gets them back.
"""

from __future__ import annotations

import re
from itertools import count
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

STORES = ("s3", "gs", "az")
SCHEMES = (*STORES, "http", "https", "hf")
_HIDDEN = "REDACTED"
_ADDRESS = re.compile(
    # A password may have an apostrophe; one that ends a quoted text is not followed by a letter.
    rf"\b(?:{'|'.join(SCHEMES)})://(?:(?:[^\s'\"<>`/?#]|'(?=\w))*@)?[^\s'\"<>`]+",
    re.IGNORECASE,
)
_SECRET = re.compile(
    r"^(x-(amz|goog)-(signature|credential)|signature|sig|.*(token|key|secret|password|passwd|pwd)"
    r"|pass|awsaccesskeyid|googleaccessid|policy|key-pair-id|credentials?|auth|authorization|code"
    r"|jwt|hmac|hdn\w+|__gda__)$",
    re.IGNORECASE,
)
_REDACTED = re.compile(rf"{_HIDDEN}(-\d+)?")
_FULL: dict[str, str] = {}  # whole addresses by what is shown of them; they are in no file


def is_address(reference: str) -> bool:
    """Tell whether a model's name is an address.

    >>> is_address("s3://bucket/model"), is_address("org/name"), is_address("s3:/model")
    (True, False, False)
    """
    scheme, found, rest = reference.partition("://")
    return bool(found and rest) and scheme.lower() in SCHEMES


def without_secrets(text: str) -> str:
    """Return a text whose addresses have no passwords and signatures; the whole ones are kept.

    >>> without_secrets("model: https://me:secret@host/a.safetensors?v=1&sig=abc")
    'model: https://REDACTED@host/a.safetensors?v=1&sig=REDACTED'
    """
    return _ADDRESS.sub(lambda found: _shown(found[0]), text)


def shown_in(value: Any) -> Any:
    """Return a value of a file with `without_secrets` of the texts in it."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {key: shown_in(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shown_in(each) for each in value]
    return value


def _shown(address: str) -> str:
    try:
        parts = urlsplit(address)
    except ValueError:
        return address
    user, _, host = parts.netloc.rpartition("@")
    query = parse_qsl(parts.query, keep_blank_values=True)
    secrets = [user, *(value for name, value in query if _SECRET.match(name))]
    if all(not secret or _REDACTED.fullmatch(secret) for secret in secrets):
        return address
    for number in count(1):
        # Of two addresses that differ only in their secrets, each is shown otherwise.
        hidden = _HIDDEN if number == 1 else f"{_HIDDEN}-{number}"
        kept = [(name, hidden if value and _SECRET.match(name) else value) for name, value in query]
        shown = urlunsplit(
            parts._replace(
                netloc=f"{hidden}@{host}" if user else parts.netloc,
                query=parts.query if kept == query else urlencode(kept),
            )
        )
        if _FULL.setdefault(shown, address) == address:
            return shown
    raise AssertionError


def with_secrets(address: str) -> str:
    """Return the whole address of one that is shown; the same where nothing was taken out."""
    return _FULL.get(address, address)


def lacks_secrets(address: str) -> bool:
    """Tell whether what was secret in an address is not known, as after reading a manifest."""
    return _HIDDEN in address and address not in _FULL


def inside(address: str, name: str) -> str:
    """Return the address of a file in a folder.

    >>> inside("https://host/model/?v=1", "a b.json")
    'https://host/model/a%20b.json?v=1'
    """
    parts = urlsplit(address)
    if parts.scheme.lower() in STORES:
        joined = f"{address.rstrip('/')}/{name}"
    else:
        joined = urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))
    if address in _FULL:
        _FULL[joined] = inside(_FULL[address], name)
    return joined


def file_name(address: str) -> str:
    """Return the last part of an address.

    >>> file_name("https://host/model.safetensors?v=1")
    'model.safetensors'
    """
    parts = urlsplit(address)
    path = parts.path if parts.scheme.lower() not in STORES else address.partition("://")[2]
    return path.rstrip("/").rpartition("/")[2]
