"""What is wrong with the keys of a spec, with lines and advice."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from outliermerge.errors import SpecError, nearest, quoted, suggest
from outliermerge.methods.contract import MergeMethod
from outliermerge.spec.document import (
    DTYPE_ABBREVIATIONS,
    BaseEntry,
    ModelEntry,
    ModifierEntry,
    SliceEntry,
    SourceEntry,
    SpecDocument,
)
from outliermerge.spec.quantize import OF_GGUF, QuantizeEntry
from outliermerge.spec.settings import SpecPath
from outliermerge.spec.text import SpecText
from outliermerge.spec.tokenizer import TokenEntry, TokenizerEntry
from outliermerge.spec.validation import how_to_write, in_words, is_meant, without_consequences

_ENTRIES: dict[str, type[BaseModel]] = {
    "models": ModelEntry,
    "base_model": BaseEntry,
    "modifiers": ModifierEntry,
    "slices": SliceEntry,
    "sources": SourceEntry,
    "tokenizer": TokenizerEntry,
    "quantize": QuantizeEntry,
}


def explained(
    problems: Sequence[Any],
    raw: Mapping[str, Any],
    source: SpecText,
    method: MergeMethod | None,
) -> Iterator[SpecError]:
    """Yield an error for each of pydantic's problems with a spec.

    Args:
        method: the spec's method, where it names one.
    """
    missing = [problem for problem in problems if problem["type"] == "missing"]
    for problem in without_consequences(problems):
        error = _explained(problem, raw, source, method)
        if problem["type"] == "extra_forbidden" and problem["loc"][0] != "modifiers":
            # mergekit, too, refuses a file in which a required key is misspelt.
            if not any(is_meant(other, problem["loc"]) for other in missing):
                error.passed_over = tuple(problem["loc"])
        yield error


def _explained(
    problem: Any, raw: Mapping[str, Any], source: SpecText, method: MergeMethod | None
) -> SpecError:
    path: SpecPath = tuple(problem["loc"])
    if path[0] == "base_model" and not isinstance(raw.get("base_model"), dict):
        path = path[:1]
    match problem["type"]:
        case "extra_forbidden":
            named = [str(key) for key in path[:-1] if key in _ENTRIES]
            kind = _ENTRIES[named[-1]] if named else SpecDocument
            fields = (TokenEntry if path[:2] == ("tokenizer", "tokens") else kind).model_fields
            name = str(path[-1])
            advice = suggest(name, fields)
            near = nearest(name, method.parameters) if method is not None else None
            if method is not None and name in method.parameters:
                advice = f"It is a parameter of {method.name}: put it under `parameters`."
            elif near is not None and nearest(name, fields) is None:
                advice = f"Did you mean the parameter {near!r}? Put it under `parameters`."
            elif kind is QuantizeEntry and name in SpecDocument.model_fields:
                advice = "It is a key of the spec: put it beside `quantize`."
            error = source.error(path, f"unknown key {quoted(name)}. {advice}", at_key=True)
            error.meant = near
            return error
        case "missing":
            return source.error(path[:-1], f"`{path[-1]}` is missing")
        case "model_type" if path == ("base_model",):
            return source.error(
                path, f"{in_words(problem)[: -len('a mapping')]}a text or a mapping"
            )
        case "literal_error" if path == ("quantize", "to") and raw.get("format") == "gguf":
            return source.error(path, f"found {quoted(str(problem['input']))}, expected {OF_GGUF}")
        case "literal_error":
            words = re.findall(r"'([^']+)'", problem["ctx"]["expected"])
            known = {word: word for word in words}
            if path[-1] in ("dtype", "out_dtype"):
                known = DTYPE_ABBREVIATIONS | known
            begun = [word for word in words if word.startswith(str(problem["input"]))]
            near = begun[0] if len(begun) == 1 else nearest(str(problem["input"]), known)
            advice = f". Did you mean {quoted(known[near])}?" if near is not None else ""
            return source.error(path, in_words(problem) + advice)
        case _:
            return source.error(
                path, in_words(problem) + how_to_write(problem, python=source.is_python)
            )
