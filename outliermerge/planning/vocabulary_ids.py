"""The token ids in an output's configs, which must be those of its tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.config import at_level, language_levels, read_json
from outliermerge.errors import OutlierMergeError, listing, shown
from outliermerge.planning.nested_ids import FORMS, may_have_ids, moved
from outliermerge.planning.special_tokens import special_token
from outliermerge.planning.tokenizer_pieces import no_union
from outliermerge.planning.vocabulary_config import id_values, reached
from outliermerge.storage.json_text import json_bytes

CONFIGS = ("config.json", "generation_config.json")
_WORD = re.compile(r"^(?:decoder_start_|forced_)?(bos|eos|pad|unk|sep|cls|mask)_token_id$")
_OF_TOKENIZER = ("bos_token_id", "eos_token_id", "pad_token_id")
_SUPPRESSED = re.compile(r"suppress_tokens$")
_END = "eos_token_id"

_LEFT_OUT = "are left out, as the output does not have all of their tokens"
_NOT_MOVED = "stays as it is: ids of tokens in it are not the output's"


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


_UNION = "`tokenizer: {source: union}` keeps them"
_WAYS_OUT = "`config_source` takes another model's config; an id without use can be taken out."


def changed_ids(
    config: Side,
    tokenizer: Side,
    tokens: Mapping[int, str],
    *,
    ways_out: str = "",
    keeps_ends: bool = False,
) -> tuple[dict[str, dict[tuple[str, ...], Any]], list[str]]:
    """Return by file the values of a config that change, by the keys to them; and notes.

    An id becomes that of the same token. The ids with which texts begin, end and are padded are
    those of the model whose tokenizer it is, where its configs have them.

    Args:
        config: the model whose config the output has.
        tokenizer: the model whose tokenizer the output's is made from.
        tokens: the output's tokens by id.
        ways_out: what can be done about tokens that the output does not have, if it is no merge.
        keeps_ends: texts also end with the tokens with which they did by this config.

    Raises:
        OutlierMergeError: the config names a token that the output does not have.
    """
    ids = {token: id_ for id_, token in tokens.items()}
    changed: dict[str, dict[tuple[str, ...], Any]] = {}
    notes, lost = _Notes(), []
    for file in CONFIGS:
        own = read_json(config.home / file)
        changed[file] = dict(_nested(own, file, config, ids, notes))
        for path, own_ids in (*id_values(own), *_lacking(own, tokenizer, config, file)):
            key, whose, value = path[-1], config, at_level(own, path[:-1]).get(path[-1])
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
                notes.add(
                    file,
                    f" of {shown(whose.name)}: {'.'.join(path)} {named} is no token of the "
                    f"output, which has {', '.join(map(str, kept)) or 'none'} there",
                )
            if keeps_ends and key == _END and whose is tokenizer:
                of_own = [ids[t] for i in own_ids if (t := config.tokens.get(i)) in ids]
                if further := [id_ for id_ in of_own if id_ not in kept]:
                    kept, value = [*kept, *further], [*numbers, *further]
                    ends = shown(", ".join(repr(tokens[id_]) for id_ in further))
                    notes.add(
                        file,
                        ")",
                        f"{shown(config.name)} ends its texts with {ends}: the output stops there, "
                        f"too ({'.'.join(path)} {', '.join(map(str, further))} in ",
                    )
            new = (kept or None) if isinstance(value, list) else next(iter(kept), None)
            if new != at_level(own, path[:-1]).get(key):
                changed[file][path] = new
    if lost:
        if not ways_out:
            ways_out = f"{no_union((config.root, tokenizer.root)) or _UNION}. {_WAYS_OUT}"
        raise OutlierMergeError(
            "the config names tokens that the output's tokenizer does not have:\n"
            f"{listing(lost, limit=5)}\n{ways_out}"
        )
    return {file: values for file, values in changed.items() if values}, notes.texts()


class _Notes:
    """Notes on files; what is true of two files is said once."""

    def __init__(self) -> None:
        self._files: dict[tuple[str, str], list[str]] = {}

    def add(self, file: str, after: str, before: str = "") -> None:
        """Add a note in which the file's name stands between two texts."""
        self._files.setdefault((before, after), []).append(file)

    def texts(self) -> list[str]:
        return [f"{before}{' and '.join(files)}{after}"
                for (before, after), files in self._files.items()]  # fmt: skip


def _nested(
    own: Mapping[str, Any], file: str, config: Side, ids: Mapping[str, int], notes: _Notes
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield settings that hold lists of ids, with the output's ids; note what is left out."""
    new_ids = {id_: ids[token] for id_, token in config.tokens.items() if token in ids}
    if len(new_ids) == len(config.tokens) and all(old == new for old, new in new_ids.items()):
        return
    plain = {path for path, _ in id_values(own)}
    of = f" of {shown(config.name)}: "
    for level in language_levels(own):
        for key, value in at_level(own, level).items():
            path = (*level, key)
            if not value or (key not in FORMS and (path in plain or file == CONFIGS[0])):
                continue
            try:
                new, num_lost = moved(key, value, new_ids)
            except ValueError:
                if may_have_ids(key, value):
                    notes.add(file, f"{of}{'.'.join(path)} {_NOT_MOVED}")
                continue
            if num_lost:
                notes.add(file, f"{of}{num_lost} of the words in {'.'.join(path)} {_LEFT_OUT}")
            if new != value:
                yield path, new


def _of_any_level(config: Mapping[str, Any], key: str) -> Any:
    """Return an id in a config, of the outermost level that has one; None if there is none."""
    values = (at_level(config, level).get(key) for level in language_levels(config))
    return next((value for value in values if _numbers(value)), None)


def _said(tokenizer: Side, config: Side, file: str, key: str) -> Any:
    """Return an id in the configs of the model whose tokenizer it is; None if it has none."""
    if tokenizer.home == config.home:
        return None
    found = (_of_any_level(read_json(tokenizer.home / name), key) for name in (file, *CONFIGS))
    return next((value for value in found if value is not None), None)


def _lacking(
    own: Mapping[str, Any], tokenizer: Side, config: Side, file: str
) -> Iterator[tuple[tuple[str, ...], list[int]]]:
    """Yield the keys to ids that a config lacks at every level, and the tokenizer's model has.

    They belong into the language model's part, where loaders look for them.
    """
    theirs = read_json(tokenizer.home / file) if own and tokenizer.home != config.home else {}
    for key in _OF_TOKENIZER:
        if _of_any_level(own, key) is None and _of_any_level(theirs, key) is not None:
            yield (*language_levels(own)[-1], key), []


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
