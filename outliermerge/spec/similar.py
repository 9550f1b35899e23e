"""What may have been meant by a part of a tensor's name that is in no name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice

from outliermerge.errors import nearest, quoted, shown

_MAX_NAMES, _MAX_PARTS, _NUM_SHOWN = 20_000, 2000, 8
_SIGNS = re.compile(r"\\.|[\^$*+?()|\[\]{}\\]+")


def part_meant(text: str, names: Iterable[str], *, is_pattern: bool = False) -> str:
    """Return a sentence with the part of a name that is nearest to a text.

    Args:
        is_pattern: the text is a regular expression; else it is a filter, which is none.

    >>> part_meant("mlp.gateproj", ["model.layers.0.mlp.gate_proj.weight"])
    "Did you mean 'mlp.gate_proj'?"
    >>> part_meant("*.mlp.*", ["model.layers.0.mlp.gate_proj.weight"])
    "A filter is a part of a name, without signs such as * and ^: write '.mlp.'."
    """
    some = list(islice(names, _MAX_NAMES))
    plain = _SIGNS.sub(lambda found: found[0][1:] if found[0][0] == "\\" else "", text)
    if not is_pattern and plain != text and plain and any(plain in name for name in some):
        return (
            f"A filter is a part of a name, without signs such as * and ^: write {quoted(plain)}."
        )
    length = plain.strip(".").count(".") + 1
    parts: dict[str, None] = {}
    for name in some:
        words = name.split(".")
        for start in range(len(words) - length + 1):
            parts[".".join(words[start : start + length])] = None
        if len(parts) > _MAX_PARTS:
            break
    if near := nearest(plain.strip("."), list(parts)[:_MAX_PARTS]):
        return f"Did you mean {quoted(near)}?"
    every = (word for name in some for word in name.split(".") if not word.isdigit())
    found = list(dict.fromkeys(every))
    more = ", …" if len(found) > _NUM_SHOWN else ""
    return f"Parts of names are: {shown(', '.join(found[:_NUM_SHOWN]))}{more}." if found else ""
