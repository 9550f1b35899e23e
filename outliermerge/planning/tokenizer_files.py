"""The tokenizer's files beside the weights, and the number of rows that the config says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.config import read_json, text_config
from outliermerge.checkpoint.tokens import read_tokens
from outliermerge.errors import OutlierMergeError, listing
from outliermerge.jobs import Input, Plan
from outliermerge.planning.vocabulary import Alignment


def check_tokenizer(inputs: Sequence[Input], entry: Input, alignment: Alignment) -> list[str]:
    """Refuse a tokenizer that does not fit the output's rows; return notes on what is added."""
    if entry is not inputs[0]:
        _check_tokenizer(inputs[0], entry, alignment)
    if alignment.added_tokens and not _covers(entry, alignment):
        _check_extensible(entry, inputs, alignment)
        return [f"{len(alignment.added_tokens)} tokens are added to the tokenizer"]
    return []


def _check_tokenizer(reference: Input, entry: Input, alignment: Alignment) -> None:
    """Refuse a tokenizer whose ids are not the output's rows."""
    ours = dict(read_tokens(reference.tokenizer_home) or {})
    ours |= {number: token for number, token, _ in alignment.added_tokens}
    theirs = read_tokens(entry.tokenizer_home) or {}
    wrong = [
        f"{number}: {ours[number]!r} in the output, {token!r} in that tokenizer"
        for number, token in sorted(theirs.items())
        if ours.get(number, token) != token
    ]
    if wrong:
        raise OutlierMergeError(
            f"tokenizer_source: the ids of {entry.reference} are not the rows of the output:\n"
            f"{listing(wrong, limit=5)}"
        )
    num_rows = alignment.num_rows or text_config(read_json(reference.home / "config.json")).get(
        "vocab_size"
    )
    beyond = [
        f"{n}: {token!r}" for n, token in sorted(theirs.items()) if num_rows and n >= num_rows
    ]
    if beyond:
        raise OutlierMergeError(
            f"tokenizer_source: {entry.reference} has tokens beyond the output's {num_rows} rows:\n"
            f"{listing(beyond, limit=5)}\n`vocabulary: union` keeps their rows."
        )


def _covers(entry: Input, alignment: Alignment) -> bool:
    tokens = read_tokens(entry.tokenizer_home) or {}
    return all(tokens.get(number) == token for number, token, _ in alignment.added_tokens)


def _check_extensible(entry: Input, inputs: Sequence[Input], alignment: Alignment) -> None:
    if not (entry.home / "tokenizer.json").is_file():
        raise OutlierMergeError(
            f"vocabulary: union has to add tokens to the tokenizer of {entry.reference}, "
            "which has no tokenizer.json: save it with transformers' fast tokenizer first"
        )
    ordinary = [
        f"{token!r} of {inputs[model].reference}"
        for _, token, model in alignment.added_tokens
        if token not in _added_entries(inputs[model].tokenizer_home)
    ]
    if ordinary:
        raise OutlierMergeError(
            "vocabulary: union can only add tokens that were added to a tokenizer whole; these "
            f"are pieces of the tokenizer's own model:\n{listing(ordinary, limit=5)}\n"
            "`vocabulary: base` leaves them out; `tokenizer_source` takes a tokenizer that has all."
        )


def _added_entries(home: Path) -> dict[str, dict[str, Any]]:
    entries = read_json(home / "tokenizer.json").get("added_tokens", [])
    return {entry["content"]: entry for entry in entries}


def extend_files(contents: dict[str, bytes], plan: Plan) -> None:
    """Add the tokens of a vocabulary that grows to the tokenizer's files."""
    present = {
        entry["id"]
        for entry in json.loads(contents.get("tokenizer.json", b"{}")).get("added_tokens", [])
    } if plan.added_tokens else set()  # fmt: skip
    for number, token, model in plan.added_tokens:
        if number in present:
            continue
        entry = _added_entries(plan.inputs[model].tokenizer_home)[token] | {"id": number}
        for name, change in _TOKEN_FILES.items():
            if name in contents:
                contents[name] = _changed_json(contents[name], lambda v, c=change, e=entry: c(v, e))


def set_vocab_size(config: dict[str, Any], plan: Plan) -> bool:
    """Write the vocabulary's number of rows where the merge changes it; tell if it did."""
    if plan.num_rows is None or "vocab_size" not in (text := text_config(config)):
        return False
    changed: bool = text["vocab_size"] != plan.num_rows
    text["vocab_size"] = plan.num_rows  # type: ignore[index]  # of the dict just parsed
    return changed


def _changed_json(data: bytes, change: Any) -> bytes:
    """Return JSON text after a change that tells whether it did anything; else the same bytes."""
    try:
        value = json.loads(data)
    except ValueError:
        return data
    if not change(value):
        return data
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _extend_tokenizer(tokenizer: Any, entry: Mapping[str, Any]) -> bool:
    tokenizer["added_tokens"] = [*tokenizer.get("added_tokens", []), entry]
    return True


def _extend_config(config: Any, entry: Mapping[str, Any]) -> bool:
    if "added_tokens_decoder" not in config:
        return False
    described = {key: value for key, value in entry.items() if key != "id"}
    config["added_tokens_decoder"][str(entry["id"])] = described
    return True


def _extend_list(tokens: Any, entry: Mapping[str, Any]) -> bool:
    tokens[entry["content"]] = entry["id"]
    return True


_TOKEN_FILES = {
    "tokenizer.json": _extend_tokenizer,
    "tokenizer_config.json": _extend_config,
    "added_tokens.json": _extend_list,
}
