"""The vocabulary in configs: its number of rows, and the ids of special tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from outliermerge.checkpoint.config import at_level, language_levels
from outliermerge.checkpoint.model_types import effective_config

_SIZES = ("vocab_size", "padded_vocab_size")
_ID = re.compile(r"_token_(ids?|index)$|^(begin_)?suppress_tokens$")


def vocabulary_sizes(config: Mapping[str, Any]) -> tuple[int | None, set[int]]:
    """Return the language model's vocab_size and those of other parts (codebooks, a Q-Former)."""
    everywhere = list(_sizes(config))
    levels = language_levels(config)
    own = [size for level in reversed(levels) for path, size in everywhere if path == level]
    others = {size for path, size in everywhere if path not in levels}
    if not own and len(levels) == 1 and len(others) == 1:
        return others.pop(), set()
    if not own and others and (full := effective_config(config)) is not None:
        size = at_level(full, language_levels(full)[-1]).get("vocab_size")
        own = [size] if isinstance(size, int) else []
    return (own[0] if own else None), others - set(own)


def _sizes(
    config: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], int]]:
    for key, value in config.items():
        if key == "vocab_size" and type(value) is int:
            yield path, value
        elif isinstance(value, dict):
            yield from _sizes(value, (*path, key))


def with_vocab_size(config: Mapping[str, Any], num_rows: int) -> dict[str, Any]:
    """Return a config with a new vocab_size at every place where a loader looks for it.

    If the language model's level has no vocab_size, its model type's default applies, and the key
    is written only if the default differs. Outer levels that repeat the old number are changed as
    well.
    """
    changed: dict[str, Any] = json.loads(json.dumps(config))
    levels = language_levels(config)
    everywhere = [path for path, _ in _sizes(config)]
    own = [path for path in levels if path in everywhere]
    if not own and len(levels) == 1 and len(everywhere) == 1:
        own = levels = everywhere
    before = at_level(config, own[-1])["vocab_size"] if own else None
    for path in levels:
        level = reached(changed, path)
        for key in _SIZES:
            if key in level and (path == levels[-1] or level[key] == before):
                level[key] = num_rows
    if levels[-1] in own:
        return changed
    full = effective_config(changed)
    path = levels[-1] if full is None else language_levels(full)[-1]
    if full is None or at_level(full, path).get("vocab_size") != num_rows:
        reached(changed, path)["vocab_size"] = num_rows
    return changed


def reached(config: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """Return a level of a config, to change it; a missing one is made."""
    for key in path:
        if not isinstance(config.get(key), dict):
            config[key] = {}
        config = config[key]
    return config


def named_ids(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the token ids in a config or generation config, by key.

    >>> named_ids({"eos_token_id": [2, 5], "vision_config": {"pad_token_id": 0}})
    {'eos_token_id': [2, 5]}
    """
    return {".".join(path): ids for path, ids in id_values(config)}


def id_values(config: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], list[int]]]:
    """Yield the keys that lead to token ids in a config or generation config, and the ids."""
    for path in language_levels(config):
        for key, value in at_level(config, path).items():
            ids = value if isinstance(value, list) else [value]
            if _ID.search(key) and (numbers := [i for i in ids if type(i) is int and i >= 0]):
                yield (*path, key), numbers


def fit_config(contents: dict[str, bytes], num_rows: int | None) -> None:
    """Write the number of vocabulary rows into the output's config if it changes."""
    try:
        config = json.loads(contents.get("config.json", b"null"))
    except ValueError:
        return
    if num_rows is None or not isinstance(config, dict):
        return
    if (changed := with_vocab_size(config, num_rows)) != config:
        text = json.dumps(changed, indent=2, ensure_ascii=False) + "\n"
        contents["config.json"] = text.encode()
