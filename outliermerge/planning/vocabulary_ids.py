"""The token ids in an output's configs, which must be those of its tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.config import at_level, read_json, text_config
from outliermerge.errors import OutlierMergeError, listing, shown
from outliermerge.planning.special_tokens import special_token
from outliermerge.planning.vocabulary_config import id_values, reached
from outliermerge.storage.json_text import json_bytes

CONFIGS = ("config.json", "generation_config.json")
_WORD = re.compile(r"^(?:decoder_start_|forced_)?(bos|eos|pad|unk|sep|cls|mask)_token_id$")
_OF_TOKENIZER = ("bos_token_id", "eos_token_id", "pad_token_id")
_SUPPRESSED = re.compile(r"suppress_tokens$")
_END, _WORDS = "eos_token_id", "bad_words_ids"


@dataclass(frozen=True)
class Side:
    """A model's config, and the tokenizer that its ids are of.

    Attributes:
        name: the model's name in the spec.
        home: the folder of its configs.
        root: the folder of its tokenizer.
        tokens: its tokens by id.
        num_rows: of its vocabulary tensors.
    """

    name: str
    home: Path
    root: Path
    tokens: Mapping[int, str]
    num_rows: int


_WAYS_OUT = (
    "`tokenizer: {source: union}` keeps them, `config_source` takes another model's config; an id "
    "without use can be taken out."
)


def changed_ids(
    config: Side,
    tokenizer: Side,
    tokens: Mapping[int, str],
    *,
    ways_out: str = _WAYS_OUT,
    keeps_ends: bool = False,
) -> tuple[dict[str, dict[tuple[str, ...], Any]], list[str]]:
    """Return by file the values of a config that change, by the keys to them; and notes.

    An id becomes that of the same token. The ids with which texts begin, end and are padded are
    those of the model whose tokenizer it is, where its configs have them.

    Args:
        config: the model whose config the output has.
        tokenizer: the model whose tokenizer the output's is made from.
        tokens: the output's tokens by id.
        ways_out: what can be done about tokens that the output does not have.
        keeps_ends: texts also end with the tokens with which they did by this config.

    Raises:
        OutlierMergeError: the config names a token that the output does not have.
    """
    ids = {token: id_ for id_, token in tokens.items()}
    changed: dict[str, dict[tuple[str, ...], Any]] = {}
    notes, lost = [], []
    for file in CONFIGS:
        own = read_json(config.home / file)
        if _WORDS in own and (words := _moved(own[_WORDS], config, ids)) != own[_WORDS]:
            changed.setdefault(file, {})[(_WORDS,)] = words
        for path, own_ids in id_values(own):
            key, whose, value = path[-1], config, at_level(own, path[:-1])[path[-1]]
            if key in _OF_TOKENIZER and (said := _said(tokenizer, config, file, key)) is not None:
                whose, value = tokenizer, said
            numbers = _numbers(value)
            kept = [ids[t] for i in numbers if (t := whose.tokens.get(i)) in ids]
            gone = [i for i in numbers if whose.tokens.get(i) not in ids]
            if gone and all(i not in whose.tokens and i >= whose.num_rows for i in gone):
                continue  # it names no row in its own model either
            named = shown(", ".join(f"{i} ({whose.tokens.get(i, 'no token')!r})" for i in gone))
            word = _WORD.match(key)
            if not kept and word and (token := special_token(tokenizer.root, f"{word[1]}_token")):
                kept = [ids[token]] if token in ids else []
            if not kept and not word and not _SUPPRESSED.search(key):
                lost.append(f"{file} of {shown(config.name)}: {'.'.join(path)} {named}")
                continue
            if gone:
                notes.append(
                    f"{file} of {shown(whose.name)}: {'.'.join(path)} {named} is no token of the "
                    f"output, which has {', '.join(map(str, kept)) or 'none'} there"
                )
            if keeps_ends and key == _END and whose is tokenizer:
                of_own = [ids[t] for i in own_ids if (t := config.tokens.get(i)) in ids]
                if further := [id_ for id_ in of_own if id_ not in kept]:
                    kept, value = [*kept, *further], [*numbers, *further]
                    notes.append(
                        f"{shown(config.name)} ends its texts with "
                        f"{shown(', '.join(repr(tokens[id_]) for id_ in further))}: the output "
                        f"stops there, too ({'.'.join(path)} {', '.join(map(str, further))} in "
                        f"{file})"
                    )
            new = (kept or None) if isinstance(value, list) else next(iter(kept), None)
            if new != at_level(own, path[:-1])[key]:
                changed.setdefault(file, {})[path] = new
        for key, id_ in _lacking(own, tokenizer, config, file, ids).items():
            changed.setdefault(file, {})[(key,)] = id_
    if lost:
        raise OutlierMergeError(
            "the config names tokens that the output's tokenizer does not have:\n"
            f"{listing(lost, limit=5)}\n{ways_out}"
        )
    return changed, notes


def _moved(words: Any, of: Side, ids: Mapping[str, int]) -> Any:
    """Return words, which are lists of ids, in the output's ids; None if none can be written."""
    if not isinstance(words, list) or not all(isinstance(word, list) for word in words):
        return words
    moved = [
        [ids[t] for i in word if type(i) is int and (t := of.tokens.get(i, "")) in ids]
        for word in words
    ]  # a word with a token that the output does not have cannot be written
    pairs = zip(moved, words, strict=True)
    return [own for own, word in pairs if len(own) == len(word)] or None


def _said(tokenizer: Side, config: Side, file: str, key: str) -> Any:
    """Return an id in the configs of the model whose tokenizer it is; None if it has none."""
    if tokenizer.home == config.home:
        return None
    for name in (file, *CONFIGS):
        found = read_json(tokenizer.home / name)
        value = found.get(key, text_config(found).get(key))
        if _numbers(value):
            return value
    return None


def _lacking(
    own: Mapping[str, Any], tokenizer: Side, config: Side, file: str, ids: Mapping[str, int]
) -> dict[str, Any]:
    """Return ids that a config lacks, and the same file of the tokenizer's model has.

    A config in which a part holds the ids is left alone.
    """
    theirs = read_json(tokenizer.home / file) if tokenizer.home != config.home else {}
    if not own or text_config(own) is not own:
        return {}
    found = {}
    for key in _OF_TOKENIZER:
        new = [
            ids[t] for i in _numbers(theirs.get(key)) if (t := tokenizer.tokens.get(i, "")) in ids
        ]
        if new and not _numbers(own.get(key)):
            found[key] = new if isinstance(theirs[key], list) else new[0]
    return found


def _numbers(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [number for number in values if type(number) is int and number >= 0]


def fit_ids(data: bytes, values: Mapping[tuple[str, ...], Any]) -> bytes:
    """Return a config with values changed; one that is no object stays as it is."""
    config = json.loads(data)
    if not isinstance(config, dict):
        return data
    for path, value in values.items():
        reached(config, path[:-1])[path[-1]] = value
    return json_bytes(config)
