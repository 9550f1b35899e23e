"""Output heads that are tied to the embeddings: stored in one model, left out by another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from outliermerge.checkpoint.config import read_json, text_config
from outliermerge.checkpoint.meta import Source
from outliermerge.jobs import Input

_HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "shared.weight")


@dataclass(frozen=True)
class TiedHead:
    """A head that a model stores and the reference ties: left out if it equals the embeddings.

    Attributes:
        number: of the input.
        name: of the head in the merge.
        head, embeddings: the two tensors.
    """

    number: int
    name: str
    head: Source
    embeddings: Source


def ties_head(config: Mapping[str, Any]) -> bool | None:
    """Tell whether a config ties the head to the embeddings; None where it does not say.

    >>> ties_head({"tie_word_embeddings": True, "text_config": {}}), ties_head({})
    (True, None)
    """
    for part in (config, text_config(config)):
        if isinstance(value := part.get("tie_word_embeddings"), bool):
            return value
    return None


def match_heads(inputs: tuple[Input, ...]) -> tuple[tuple[Input, ...], list[TiedHead], list[str]]:
    """Give models that tie their head one to pair with, and find heads that the reference ties.

    Returns:
        The inputs, of which those that tie their head have their embeddings under its name where
        the reference stores one; the heads that only models store; and notes.
    """
    reference = inputs[0].checkpoint.tensors
    heads = {name for name in reference if is_head(name)}
    matched, stray, notes = [inputs[0]], [], []
    for number, entry in enumerate(inputs[1:], start=1):
        tensors = entry.checkpoint.tensors
        for name in set() if any(map(is_head, tensors)) else heads:
            embeddings = _embeddings(tensors, reference[name])
            if embeddings is not None and ties_head(_config(entry)) is not False:
                tensors = {**tensors, name: tensors[embeddings]}
                notes.append(
                    f"{entry.reference} ties {name} to {embeddings}: its embeddings are its head"
                )
        matched.append(replace(entry, checkpoint=replace(entry.checkpoint, tensors=tensors)))
        if not heads and ties_head(_config(inputs[0])) is not False:
            for name in filter(is_head, tensors):
                embeddings = _embeddings(tensors, tensors[name])
                if embeddings is not None and embeddings in reference:
                    stray.append(TiedHead(number, name, tensors[name], tensors[embeddings]))
    return tuple(matched), stray, notes


def is_head(name: str) -> bool:
    """Tell whether a tensor is a language model's output head."""
    return name == _HEAD or name.endswith("." + _HEAD)


def _config(entry: Input) -> Mapping[str, Any]:
    return read_json(entry.home / "config.json")


def _embeddings(tensors: Mapping[str, Source], head: Source) -> str | None:
    """Return the name of the embeddings that a head of this shape can be tied to."""
    found = [
        name
        for name, source in tensors.items()
        if name.endswith(_EMBEDDINGS) and source.shape[1:] == head.shape[1:]
    ]
    return found[0] if len(found) == 1 else None
