"""Where texts end: an output stops at every token with which one of the merged models ends a text.

A chat model that was trained to end its turns with a token of its own, such as <|im_end|>, passes
that habit on. With the base's generation config alone, the output would never stop there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from outliermerge.checkpoint.config import read_json
from outliermerge.checkpoint.tokens import read_tokens
from outliermerge.errors import shown
from outliermerge.planning.owners import input_named
from outliermerge.planning.plan import Input, Sidecar
from outliermerge.planning.special_tokens import special_token
from outliermerge.planning.tokenizer_pieces import no_union
from outliermerge.planning.vocabulary import Alignment
from outliermerge.planning.vocabulary_config import named_ids
from outliermerge.spec.check import MergeSpec

GENERATION = "generation_config.json"
_KEY = "eos_token_id"
Changes = dict[str, dict[tuple[str, ...], Any]]


def further_stops(
    spec: MergeSpec,
    inputs: Sequence[Input],
    models: Sequence[Input],
    sidecars: Sequence[Sidecar],
    alignment: Alignment,
    owner: Input,
) -> tuple[Changes, list[str]]:
    """Return the values of the generation config that change, and notes.

    A config that the spec asks for by `config_source` stays as it is.

    Args:
        models: those whose texts the output may end as: all that are merged, or all that parts of
            the output which write texts are made of.
        sidecars: the files beside the weights.
        alignment: has the tokens that the merge adds, or the tokenizer that it makes.
        owner: the model whose tokenizer the output has.
    """
    config = input_named(inputs, spec.document.config_source)
    file, ours = _stops(config)
    if alignment.tokenizer is not None:
        value = alignment.tokenizer.ids.get(file, {}).get((_KEY,), ours)
        ours = [id_ for id_ in (value if isinstance(value, list) else [value]) if id_ is not None]
    if not ours or file not in {sidecar.name for sidecar in sidecars}:
        return {}, []
    ended: dict[str, Input] = {}
    for entry in models:
        for token in _tokens_unlike(entry, config, owner):
            ended.setdefault(token, entry)
    if not ended:
        return {}, []
    ids = {token: id_ for id_, token in _output_tokens(owner, alignment).items()}
    notes, more = [], []
    has_union = not spec.modules and spec.command == "run"
    for token, model in ended.items():
        who = f"{shown(model.reference)} ends its texts with {shown(repr(token))}"
        if token not in ids:
            keeps = "a `base_model` that has the token keeps it"
            if has_union:
                keeps = no_union((owner.tokenizer_home, model.tokenizer_home))
                keeps = keeps or "`tokenizer_source: union` keeps the token"
            notes.append(
                f"{who}, which the output's tokenizer does not have, so that the output may not "
                f"stop where it should: {keeps}"
            )
        elif ids[token] in ours:
            continue
        elif file == GENERATION and spec.document.config_source is None:
            more.append(ids[token])
            notes.append(f"{who}: the output stops there, too ({_KEY} {ids[token]} in {file})")
        else:
            notes.append(
                f"{who} ({ids[token]}), which {file} of {shown(config.reference)} does not have "
                f"as {_KEY}: the output may not stop there. Another `config_source` brings its own"
            )
    return ({file: {(_KEY,): [*ours, *more]}} if more else {}), notes


def _stops(entry: Input) -> tuple[str, list[int]]:
    """Return the ids that end a text, and the file that says so."""
    for file in (GENERATION, "config.json"):
        found = [ids for key, ids in named_ids(read_json(entry.home / file)).items()
                 if key.rpartition(".")[2] == _KEY]  # fmt: skip
        if found:
            return file, found[-1]
    return GENERATION, []


def _tokens_unlike(entry: Input, config: Input, owner: Input) -> Iterator[str]:
    """Yield the tokens that end a model's texts, unless its files say the same as the output's."""
    ids, word = _stops(entry)[1], special_token(entry.tokenizer_home, "eos_token")
    same_ids = ids == _stops(config)[1]
    same_word = word in (None, special_token(owner.tokenizer_home, "eos_token"))
    if entry.home == config.home and entry.tokenizer_home == owner.tokenizer_home:
        return
    if same_word and same_ids and config is owner:
        return
    if (tokens := read_tokens(entry.tokenizer_home)) is None:
        return
    yield from dict.fromkeys(token for id_ in ids if (token := tokens.get(id_)) is not None)
    if same_ids and word is not None:  # a config that was left as the base's says nothing
        yield word


def _output_tokens(owner: Input, alignment: Alignment) -> Mapping[int, str]:
    if alignment.tokens is not None:
        return alignment.tokens
    added = {id_: token for id_, token, _ in alignment.added_tokens}
    return (read_tokens(owner.tokenizer_home) or {}) | added
