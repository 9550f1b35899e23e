"""The output's tokenizer files, and the tokens that a growing vocabulary adds to them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.config import read_json
from outliermerge.checkpoint.tokens import is_vocabulary, load_tokens, token_files
from outliermerge.errors import OutlierMergeError, listing, quoted, shown
from outliermerge.planning.plan import Plan
from outliermerge.storage.files import names_in, small_bytes
from outliermerge.storage.hub_cache import is_cached
from outliermerge.storage.json_text import json_bytes
from outliermerge.storage.stamps import is_there

TOKENIZER, TEKKEN = "tokenizer.json", "tekken.json"
# Files that say the same as tokenizer.json, until tokens are added to that.
_SECOND = re.compile(
    r"\.(model(\.v\d+\w*)?|tiktoken|spm|codes)$|^(vocab|merges|unigram|tekken|dict)\.(json|txt)$"
)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def added_entries(root: Path) -> dict[str, dict[str, Any]]:
    """Return the added tokens of a tokenizer, each with its entry: how text is searched for it."""
    decoder = read_json(root / "tokenizer_config.json").get("added_tokens_decoder") or {}
    entries = read_json(root / "tokenizer.json").get("added_tokens") or []
    found = {token: _entry(token) for token in read_json(root / "added_tokens.json")}
    for entry in (*(decoder.values() if isinstance(decoder, dict) else ()), *entries):
        if isinstance(entry, dict) and isinstance(entry.get("content"), str):
            found[entry["content"]] = _entry(**entry)
    return found


def _entry(content: str, **flags: Any) -> dict[str, Any]:
    known = {flag: bool(flags.get(flag, False)) for flag in _FLAGS}
    if "normalized" not in flags:
        known["normalized"] = not known["special"]
    return {"content": content} | known


def plain_entry(token: str) -> dict[str, Any]:
    """Return the entry of a token that is searched for in texts, and is nothing special."""
    return _entry(token)


def find_entries(tokens: Mapping[str, str], roots: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the entry of each token, from the first tokenizer that has it as an added token.

    Args:
        tokens: the tokens, each with the name of a model that has it.
        roots: the folders of all models' tokenizers.

    Raises:
        OutlierMergeError: in all tokenizers a token is a piece of the tokenizer's own model, not an
            added token.
    """
    found: dict[str, dict[str, Any]] = {}
    for root in roots:
        found = added_entries(root) | found
    lost = {token: name for token, name in tokens.items() if token not in found}
    if lost:
        ordinary = [f"{quoted(token)} of {shown(name)}" for token, name in lost.items()]
        raise OutlierMergeError(
            "vocabulary: union can only add tokens that were added to a tokenizer whole; these "
            f"are pieces of the tokenizer's own model:\n{listing(ordinary, limit=5)}\n"
            "`vocabulary: base` leaves them out; `tokenizer: {source: union}` in its place joins "
            "the tokenizers' models."
        )
    return [found[token] for token in tokens]


def extend_files(contents: dict[str, bytes], plan: Plan) -> None:
    """Add the new tokens of a growing vocabulary to the tokenizer files of an output."""
    if not plan.added_tokens:
        return
    root = next(file.path.parent for file in plan.sidecars if file.name == "tokenizer.json")
    files = {name: contents[name] for name in read_files(root) if name in contents}
    roots = [entry.tokenizer_home for entry in plan.inputs]
    wanted = {token: plan.inputs[number].reference for _, token, number in plan.added_tokens}
    before = load_tokens(files, root).values()
    files = extend(files, root, find_entries(wanted, roots), before)
    tokens = load_tokens(files, root)
    if any(tokens.get(id_) != token for id_, token, _ in plan.added_tokens):
        raise OutlierMergeError(f"{root}: the tokenizer's files have changed since the plan")
    contents |= files


def read_files(root: Path) -> dict[str, bytes]:
    """Return the contents of the files that define a tokenizer's ids."""
    return {path.name: small_bytes(path) for path in token_files(root)}


def extend(
    files: Mapping[str, bytes],
    root: Path,
    entries: Sequence[Mapping[str, Any]],
    before: Iterable[str],
) -> dict[str, bytes]:
    """Return a tokenizer's files with added tokens; all files have the ids of a loader.

    Tokens of other files are written into tokenizer.json as well, before the new ones, because a
    loader numbers them in this order.

    Args:
        files: the contents of the tokenizer's files by name; tokenizer.json is one of them.
        root: the folder of the tokenizer.
        entries: the entries of the new tokens.
        before: the tokens that the tokenizer has already, in the order of the loader's ids.
    """
    tokenizer = json.loads(files["tokenizer.json"])
    own = added_entries(root)
    held = _held(tokenizer)
    named = [own.get(token, _entry(token, special=True)) for token in before if token not in held]
    new = [{"id": 0, **entry} for entry in (*named, *entries)]
    tokenizer["added_tokens"] = [*(tokenizer.get("added_tokens") or []), *new]
    loaded = load_tokens({"tokenizer.json": json.dumps(tokenizer).encode()}, root)
    ids = {token: id_ for id_, token in loaded.items()}
    for entry in tokenizer["added_tokens"]:
        entry["id"] = ids.get(entry["content"], entry["id"])  # loaders skip an empty token
    tokenizer["added_tokens"].sort(key=lambda entry: entry["id"])
    changed = dict(files) | {"tokenizer.json": _dumped(tokenizer)}
    for name, change in _BESIDE.items():
        if name in files:
            value = json.loads(files[name])
            change(value, new, ids)
            changed[name] = _dumped(value)
    return changed


def contradicting(files: Mapping[str, bytes], root: Path) -> tuple[str, ...]:
    """Return the files of a tokenizer's folder that a changed tokenizer.json makes stale.

    A file stays if it leads to the same tokens, with what the other files add to it.

    Args:
        files: the contents of the changed files.
        root: the folder of the tokenizer.
    """
    second = [name for name in names_in(root) if _SECOND.search(name)]
    tokens = load_tokens(files, root) if second else {}
    beside = {name: data for name, data in files.items() if name != TOKENIZER}

    def stays(name: str) -> bool:
        if not is_vocabulary(name, root):
            return name == "merges.txt" and (root / "vocab.json").exists() and stays("vocab.json")
        try:
            return load_tokens({name: small_bytes(root / name), **beside}, root) == tokens
        except OutlierMergeError:  # it is broken, and of no use to the output
            return False

    return tuple(name for name in second if not stays(name))


def how_to_convert(root: Path) -> str:
    """Return what a user does whose tokenizer has no tokenizer.json."""
    where = ", in a copy outside the hub's cache" if is_cached(root / TOKENIZER) else ""
    return (
        f"transformers makes the file{where}: "
        f"AutoTokenizer.from_pretrained({str(root)!r}).save_pretrained({str(root)!r})."
    )


def refuse_tekken(name: str, root: Path) -> None:
    """Refuse a model of whose tokenizer there is only a file of Mistral's, in a folder.

    Its ids are not those of its lines: special tokens come first, and their number is in the file.

    Raises:
        OutlierMergeError: there is no other file of its tokenizer.
    """
    if is_there(root / TEKKEN) and not token_files(root):
        raise OutlierMergeError(
            f"{shown(name)} has only {TEKKEN} of a tokenizer, whose tokens are not read. "
            f"{how_to_convert(root)}"
        )


def _held(tokenizer: Mapping[str, Any]) -> set[str]:
    """Return the tokens in a tokenizer.json; a Unigram model has pairs of token and score."""
    words = tokenizer["model"]["vocab"]
    added = (entry["content"] for entry in tokenizer.get("added_tokens") or [])
    return {*(words if isinstance(words, dict) else (word for word, _ in words)), *added}


def _dumped(value: Any) -> bytes:
    return json_bytes(value)


def _renumber_config(
    config: dict[str, Any], entries: Sequence[Mapping[str, Any]], ids: Mapping[str, int]
) -> None:
    decoder = config.get("added_tokens_decoder")
    if decoder is None:
        return
    described = {ids[e["content"]]: e for e in decoder.values() if e["content"] in ids}
    for entry in entries:
        flags = {key: value for key, value in entry.items() if key != "id"}
        described.setdefault(entry["id"], flags)
    config["added_tokens_decoder"] = {str(id_): described[id_] for id_ in sorted(described)}


def _renumber_list(
    tokens: dict[str, Any], entries: Sequence[Mapping[str, Any]], ids: Mapping[str, int]
) -> None:
    every = {token for token in (*tokens, *(entry["content"] for entry in entries)) if token in ids}
    tokens.clear()  # leave out tokens that no loader knows
    tokens |= {token: ids[token] for token in sorted(every, key=lambda token: ids[token])}


_BESIDE: dict[str, Callable[[Any, Sequence[Mapping[str, Any]], Mapping[str, int]], None]] = {
    "tokenizer_config.json": _renumber_config,
    "added_tokens.json": _renumber_list,
}
