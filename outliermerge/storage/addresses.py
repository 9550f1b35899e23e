"""Addresses of files that are not on this machine, and what in them is secret.

Secrets are taken out of addresses where these come in: in a spec, or on a command line. So nothing
that shows or writes an address later can give one away. What is asked for gets them back.
"""

from __future__ import annotations

import re
from itertools import count
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

STORES = ("s3", "gs", "az")
SCHEMES = (*STORES, "http", "https", "hf")
_HIDDEN = "REDACTED"
_ANY_SCHEME = "|".join(SCHEMES)
_ADDRESS = re.compile(
    # A password may have an apostrophe; one that ends a quoted text is not followed by a letter.
    # After a plus another address may begin, of an adapter.
    rf"\b(?:{_ANY_SCHEME})://(?:(?:[^\s'\"<>`/?#]|'(?=\w))*@)?"
    rf"(?:(?!\+(?:{_ANY_SCHEME})://)[^\s'\"<>`])+",
    re.IGNORECASE,
)
_SECRET = re.compile(
    r"^(.*(token|key|secret|password|passwd|pwd)|pass|(x-(amz|goog)-)?credentials?|auth|jwt|code"
    r"|authorization|awsaccesskeyid|googleaccessid|policy|key-pair-id)$",
    re.IGNORECASE,
)
_SIGNATURE = re.compile(
    r"^(x-(amz|goog)-signature|signature|sig|hmac|hdn\w+|__gda__)$", re.IGNORECASE
)
_OF_SIGNATURE = re.compile(  # what is made anew with each signature of the same object
    r"^(x-(amz|goog)-(credential|date|expires|security-token)|awsaccesskeyid|googleaccessid|expires"
    r"|policy|key-pair-id|se|st|ske|skt)$",
    re.IGNORECASE,
)
_USER = re.compile(r"(?<=://)[^\s/?#]+(?=@)")
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
    for number in count(1):
        # Of two addresses that differ only in their secrets, each is shown otherwise: these may
        # be of different objects. With a new signature an object is the same.
        shown = _hidden(address, _HIDDEN if number == 1 else f"{_HIDDEN}-{number}")
        if shown == address:
            return address
        known = _FULL.setdefault(shown, address)
        if known == address or _hidden(known) == _hidden(address):
            _FULL[shown] = address
            return shown
    raise AssertionError


def _hidden(address: str, hidden: str = "") -> str:
    """Return an address without its signature, and with a word in place of its other secrets.

    Args:
        hidden: the word; other secrets stay without it.
    """
    if hidden:
        address = _USER.sub(lambda found: _hide(found[0], hidden), address)
    start, _, rest = address.partition("://")
    path = re.split(r"[?#]", rest, maxsplit=1)[0]
    # Each second word separates. In a path a value ends at a slash; behind it, it may have some.
    words = [*re.split("([;/])", path), *re.split("([?&;#])", rest[len(path) :])[1:]]
    pairs = [word.partition("=") for word in words[::2]]
    names = [unquote(name) for name, _, _ in pairs]
    for number, before in enumerate(["/", *words[1::2]]):
        if before == "/":  # it is part of the path
            pairs[number], names[number] = (words[2 * number], "", ""), ""
    is_signed = any(map(_SIGNATURE.match, names))
    for number, (written, equals, value) in enumerate(pairs):
        name = names[number]
        of_signature = _SIGNATURE.match(name) or (is_signed and _OF_SIGNATURE.match(name))
        if value and of_signature:
            value = _hide(value, _HIDDEN)
        elif value and hidden and _SECRET.match(name):
            value = _hide(value, hidden)
        else:
            value = _nested(value, hidden)
        words[2 * number] = (written if equals else _nested(written, hidden)) + equals + value
    return f"{start}://{''.join(words)}"


def _hide(secret: str, hidden: str) -> str:
    return secret if _REDACTED.fullmatch(secret) else hidden


def _nested(text: str, hidden: str) -> str:
    """Return a part of an address in which another one may be, escaped."""
    inner = unquote(text)
    if inner == text:
        return text
    shown = _hidden(inner, hidden) if "://" in inner else _nested(inner, hidden)
    return text if shown == inner else quote(shown, safe="")


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
