"""Tensors that are tied to others (an output head to the embeddings): stored or left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from outliermerge.checkpoint.config import read_json, text_config
from outliermerge.checkpoint.meta import Source
from outliermerge.jobs import Input

_EMBEDDINGS = (
    "shared.weight",
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
)
# By the end of a tied tensor's name what it may be tied to, the likeliest first (transformers'
# `_tied_weights_keys` of its model classes).
_ORIGINALS = {
    "lm_head.weight": _EMBEDDINGS,
    "predictions.decoder.weight": _EMBEDDINGS,
    "lm_head.decoder.weight": _EMBEDDINGS,
    "embed_out.weight": _EMBEDDINGS,
    "encoder.embed_tokens.weight": ("shared.weight",),
    "decoder.embed_tokens.weight": ("shared.weight",),
    "predictions.decoder.bias": ("predictions.bias",),
    "lm_head.decoder.bias": ("lm_head.bias",),
}


@dataclass(frozen=True)
class TiedCopy:
    """A copy that a model stores and the reference does not: left out if it is one.

    Attributes:
        number: of the input.
        name: of the copy in the merge.
        original: of what it is tied to.
        sources: both, as the model stores them.
    """

    number: int
    name: str
    original: str
    sources: tuple[Source, Source]


def ties_head(config: Mapping[str, Any]) -> bool | None:
    """Tell whether a config ties the head to the embeddings; None where it does not say.

    >>> ties_head({"tie_word_embeddings": True, "text_config": {}}), ties_head({})
    (True, None)
    """
    for part in (config, text_config(config)):
        if isinstance(value := part.get("tie_word_embeddings"), bool):
            return value
    return None


def is_head(name: str) -> bool:
    """Tell whether a tensor is a language model's output head, which a config may tie."""
    return _ends(name) is not None and _ORIGINALS[_ends(name) or ""] is _EMBEDDINGS


def vocabulary_rows(shapes: Mapping[str, tuple[int, ...]]) -> set[int]:
    """Return the numbers of rows that embeddings and heads have; one unless they differ."""
    return {
        shape[0] for name, shape in shapes.items() if name.endswith(_EMBEDDINGS) or is_head(name)
    }


def grown_rows(entry: Input) -> int | None:
    """Return the rows of embeddings that an adapter has changed the number of; else None."""
    if entry.home == entry.checkpoint.root:
        return None
    tensors = entry.checkpoint.tensors
    rows = {tensors[name].shape[0] for name in tensors if name.endswith(_EMBEDDINGS)}
    said = text_config(_config(entry)).get("vocab_size")
    return rows.pop() if len(rows) == 1 and said not in (None, *rows) else None


def tied_embeddings(entry: Input) -> list[str]:
    """Return the names of a model's embeddings where its head is tied to them."""
    tensors = entry.checkpoint.tensors
    if any(map(is_head, tensors)) or ties_head(_config(entry)) is not True:
        return []
    return [name for name in tensors if name.endswith(_EMBEDDINGS)]


def match_tied(inputs: tuple[Input, ...]) -> tuple[tuple[Input, ...], list[TiedCopy], list[str]]:
    """Give models that leave a tied tensor out one to pair with, and find copies of it.

    Returns:
        The inputs, of which those that lack a tied tensor have its original under its name where
        the reference stores one; copies that only models store; and notes.
    """
    reference = inputs[0].checkpoint.tensors
    copies = [name for name in reference if _ends(name)]
    untied = ties_head(_config(inputs[0])) is False
    matched, stray, notes = [inputs[0]], [], []
    for number, entry in enumerate(inputs[1:], start=1):
        tensors = entry.checkpoint.tensors
        has_head = any(map(is_head, tensors))
        said_untied = ties_head(_config(entry)) is False
        for name in copies:
            original = _original(name, tensors, reference[name])
            if name in tensors or original is None or original not in reference:
                continue
            if not (is_head(name) and (has_head or said_untied)):
                tensors = {**tensors, name: tensors[original]}
                notes.append(f"{entry.reference} ties {name} to {original}, which stands for it")
        matched.append(replace(entry, checkpoint=replace(entry.checkpoint, tensors=tensors)))
        for name in tensors:
            original = _original(name, tensors, tensors[name])
            if name in reference or original is None or original not in reference:
                continue
            pair = tensors[name], tensors[original]
            if pair[0].shape == pair[1].shape and not (is_head(name) and untied):
                stray.append(TiedCopy(number, name, original, pair))
    return tuple(matched), stray, notes


def _config(entry: Input) -> Mapping[str, Any]:
    return read_json(entry.home / "config.json")


def _ends(name: str) -> str | None:
    """Return which end of a tied tensor's name a name has."""
    return next((end for end in _ORIGINALS if name == end or name.endswith("." + end)), None)


def _original(name: str, tensors: Mapping[str, Source], copy: Source) -> str | None:
    """Return the name of what a tensor can be tied to; None where it is unclear."""
    end = _ends(name)
    for original in _ORIGINALS[end] if end else ():
        found = [
            other
            for other, source in tensors.items()
            if (other == original or other.endswith("." + original))
            and other != name
            and source.shape[1:] == copy.shape[1:]
        ]
        if found:
            return found[0] if len(found) == 1 else None
    return None
