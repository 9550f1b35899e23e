"""Token ids within lists and tables of a generation config: words that are refused, forced, biased.

They are what transformers' `GenerationConfig` takes, as JSON holds it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

_Ids = Mapping[int, int]
_KEY = re.compile(r"([(\[]?)(\d+(?:, ?\d+)*),?[)\]]?$")
_OF_TOKENS = re.compile(r"_(ids?|tokens)$")


def moved(key: str, value: Any, ids: _Ids) -> tuple[Any, int]:
    """Return a setting with other ids, and how many of its words are left out.

    A word is left out if one of its tokens has no new id. None is returned where no word is left.

    >>> moved("sequence_bias", [[[7, 8], -2.0], [[9], 1.0]], {7: 70, 8: 80})
    ([[[70, 80], -2.0]], 1)
    >>> moved("force_words_ids", [[[7], [8]], [[9]]], {7: 70, 9: 90})
    ([[[70]], [[90]]], 1)

    Args:
        key: its name.
        ids: the new id of each.

    Raises:
        ValueError: it is none of FORMS, or has another form.
    """
    lost: list[Any] = []
    if key not in FORMS:
        raise ValueError("not a setting with a known form")
    return FORMS[key](value, ids, lost) or None, len(lost)


def may_have_ids(key: str, value: Any) -> bool:
    """Tell whether a setting has token ids in a list or table, by its name and what is in it."""
    is_table = isinstance(value, (list, dict))
    return key in FORMS or (is_table and bool(_OF_TOKENS.search(key)) and _has_ids(value))


def _has_ids(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (type(value) is int and value >= 0) or any(map(_has_ids, inner))


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("not a list")
    return value


def _word(word: Any, ids: _Ids, lost: list[Any]) -> list[int] | None:
    if not all(type(id_) is int for id_ in _listed(word)):
        raise ValueError("not a list of ids")
    if all(id_ in ids for id_ in word):
        return [ids[id_] for id_ in word]
    lost.append(word)
    return None


def _words(value: Any, ids: _Ids, lost: list[Any]) -> list[Any]:
    """Return words with other ids; in place of a word there may be a list of words to choose of."""
    found = []
    for word in _listed(value):
        is_choice = bool(_listed(word)) and all(isinstance(each, list) for each in word)
        found.append(_words(word, ids, lost) if is_choice else _word(word, ids, lost))
    return [word for word in found if word]


def _biased(value: Any, ids: _Ids, lost: list[Any]) -> Any:
    """Return pairs of a word and its bias; or a table, whose keys are words written out."""
    if not isinstance(value, dict):
        pairs = [(_word(word, ids, lost), bias) for word, bias in map(_listed, _listed(value))]
        return [[word, bias] for word, bias in pairs if word]
    found = {}
    for key, bias in value.items():
        if not (match := _KEY.match(key)):
            raise ValueError("a key is no word")
        if word := _word([int(id_) for id_ in match[2].split(",")], ids, lost):
            form: Callable[[list[int]], object] = {"(": tuple, "[": list}.get(match[1], _first)
            found[str(form(word))] = bias
    return found


def _first(word: list[int]) -> int:
    return word[0]


def _placed(value: Any, ids: _Ids, lost: list[Any]) -> list[Any]:
    """Return pairs of a place and the id that is forced there, or null for none."""
    pairs = [(place, id_, [] if id_ is None else _word([id_], ids, lost))
             for place, id_ in map(_listed, _listed(value))]  # fmt: skip
    return [[place, next(iter(word), None)] for place, _, word in pairs if word is not None]


FORMS: Mapping[str, Callable[[Any, _Ids, list[Any]], Any]] = {
    "bad_words_ids": _words,
    "force_words_ids": _words,
    "sequence_bias": _biased,
    "forced_decoder_ids": _placed,
}
