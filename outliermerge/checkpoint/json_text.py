"""JSON as the loaders of models take it; of text that is none, what is wrong and what to do."""

from __future__ import annotations

import json
import re
from typing import Any

from outliermerge.checkpoint.meta import LFS_POINTER, POINTER_ADVICE

_WEB_PAGE = re.compile(rb"\s*<(!doctype\s+html|html)", re.IGNORECASE)
_END = re.compile(r"\s*\Z")


def parse_json(data: bytes, *, infinite: bool = True) -> Any:
    """Return the value of a JSON text.

    Python's parser takes more than others: UTF-16, NaN, a key that stands twice. What loaders
    refuse or take differently is refused here.

    Args:
        data: the file's bytes.
        infinite: take `Infinity`, which transformers 4 writes into configs (Mamba 2).

    Raises:
        ValueError: it is no such text; the message tells what was found, and what to do.
    """
    text = utf8_text(data)
    if not text.strip():
        raise ValueError("is empty. Fetch it again.")

    def constant(word: str) -> float:
        if word == "NaN" or not infinite:
            raise ValueError(f"has {word}, which is no JSON number. Correct it.")
        return float(word)

    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise ValueError(_found(error)) from error
    except RecursionError as error:
        raise ValueError("has lists or objects too deep in one another. Fetch it again.") from error


def utf8_text(data: bytes) -> str:
    """Return the text of a file as transformers reads it.

    Raises:
        ValueError: it is no UTF-8, or has a byte order mark, which would be part of the text.
    """
    refuse_other_content(data)
    encoding = json.detect_encoding(data)
    if encoding == "utf-8-sig":
        raise ValueError(
            "starts with a byte order mark (BOM), with which loaders fail. "
            "Save it as UTF-8 without one."
        )
    if encoding != "utf-8":
        name = "UTF-16" if encoding.startswith("utf-16") else "UTF-32"
        raise ValueError(f"is {name}. Save it as UTF-8 without a byte order mark.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte {error.start} (0x{data[error.start]:02x}) is no UTF-8. "
            "Fetch it again, or save it as UTF-8."
        ) from error


def refuse_other_content(data: bytes) -> None:
    """Raise ValueError if bytes are not a file's, but what a download left in its place."""
    if data.startswith(LFS_POINTER):
        raise ValueError(POINTER_ADVICE)
    if _WEB_PAGE.match(data):
        raise ValueError("is a web page, not the file itself. Fetch it again.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for number, key in enumerate(keys) if key in keys[:number])
        raise ValueError(
            f"has the key {twice!r} twice in one object, of which loaders take one. Take one out."
        )
    return value


def _found(error: json.JSONDecodeError) -> str:
    """Return what is wrong at the place where a parser stopped."""
    text, position = error.doc, error.pos
    where = f"line {error.lineno} column {error.colno}"
    if text.startswith(("//", "/*", "#"), position):
        return f"{where}: a comment, which JSON does not have. Take it out."
    if _END.match(text, position) or error.msg.startswith("Unterminated string"):
        return f"ends at {where} within a value: it is cut off. Fetch it again."
    before = text[:position].rstrip()
    if before.endswith(",") and text.startswith(("}", "]"), position):
        return f"{where}: a comma before {text[position]!r}. Take the comma out."
    if text.startswith(",", position) and text[position + 1 :].lstrip()[:1] in ("}", "]"):
        return f"{where}: a comma after the last value. Take it out."  # Python 3.13's position
    return f"no JSON: {where}: {error.msg}. Fetch it again, or correct it."
