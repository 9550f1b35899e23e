"""JSON as model loaders accept it; for other text, the error says what is wrong and what to do."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from outliermerge.errors import quoted, shown
from outliermerge.storage.lfs import LFS_POINTER, POINTER_ADVICE

# A value takes about a hundred bytes of memory, however short its text is. Gemma 3's tokenizer.json
# has 2.2 million values; no file of a model is nested more than ten levels deep.
MAX_VALUES, MAX_DEPTH = 4_000_000, 100
_WEB_PAGE = re.compile(rb"\s*<(!doctype\s+html|html)", re.IGNORECASE)
_END = re.compile(r"\s*\Z")


def parse_json(
    data: bytes, *, infinite: bool = True, max_values: int = MAX_VALUES, unique: bool = True
) -> Any:
    """Return the value of a JSON text.

    Python's parser accepts more than others do: UTF-16, NaN, duplicate keys. This function refuses
    text that some loaders refuse or read differently.

    Args:
        data: the file's bytes.
        infinite: accept `Infinity`, which transformers 4 writes into configs (Mamba 2).
        max_values: the largest number of values and names.
        unique: refuse duplicate keys in an object.

    Raises:
        ValueError: the text is not valid; the message says what was found, and what to do.
    """
    text = utf8_text(data)
    if not text or text.isspace():
        raise ValueError("is empty. Fetch it again.")
    # Count before the parser makes objects. Characters inside texts count as well: few files have
    # many.
    if (num_values := sum(map(text.count, "{[,:"))) > max_values:
        raise ValueError(
            f"has some {num_values:,} values, more than the {max_values:,} that such a file may "
            "have. Fetch it again."
        )

    def constant(word: str) -> float:
        if word == "NaN" or not infinite:
            raise ValueError(f"has {shown(word)}, which is no JSON number. Correct it.")
        return float(word)

    try:
        value = json.loads(
            text, object_pairs_hook=_object if unique else None, parse_constant=constant
        )
        if not _is_deeper(value, MAX_DEPTH):
            return value
    except json.JSONDecodeError as error:
        raise ValueError(_found(error)) from error
    except RecursionError:
        pass
    raise ValueError(
        f"has lists or objects too deep in one another, more than {MAX_DEPTH}. Fetch it again."
    )


def _is_deeper(value: Any, depth: int) -> bool:
    """Tell whether lists and objects are nested deeper than a limit."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(depth):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [v for values in inner for v in values if isinstance(v, (dict, list))]
    return bool(level)


def utf8_text(data: bytes) -> str:
    """Return the text of a file as transformers reads it.

    Raises:
        ValueError: it is not UTF-8, or has a byte order mark, which would become part of the text.
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


def is_web_page(data: bytes) -> bool:
    """Tell whether bytes begin as a web page does."""
    return bool(_WEB_PAGE.match(data))


def refuse_other_content(data: bytes) -> None:
    """Raise ValueError if bytes are what a failed download leaves in place of a file."""
    if data.startswith(LFS_POINTER):
        raise ValueError(POINTER_ADVICE)
    if is_web_page(data):
        raise ValueError("is a web page, not the file itself. Fetch it again.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(
            f"has the key {quoted(twice)} twice in one object, of which loaders take one. "
            "Take one out."
        )
    return value


def _found(error: json.JSONDecodeError) -> str:
    """Return in words what is wrong at the position where a parser stopped."""
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


def json_bytes(value: Any) -> bytes:
    """Return a value as the text of a JSON file of a model; what UTF-8 cannot hold is escaped."""
    try:
        return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(value, indent=2) + "\n").encode()
