"""One tokenizer with the pieces of several: their vocabularies and merges are put together.

A piece is a token of a tokenizer's own model (BPE, Unigram, WordPiece, WordLevel), unlike an added
token, which is searched for in the text first. The first tokenizer keeps its ids, and its merges
come before those of the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.config import read_json
from outliermerge.errors import OutlierMergeError, listing, quoted, shown
from outliermerge.planning.tokenizer_files import TOKENIZER, how_to_convert
from outliermerge.storage.stamps import is_there

TRANSPLANT = (
    "`outliermerge tokenizer transplant MODEL DONOR` gives a model the tokenizer of another one"
)


@dataclass(frozen=True)
class Donor:
    """A model with pieces that the output's tokenizer lacks."""

    name: str
    root: Path
    pieces: Sequence[str]


def with_pieces(
    files: Mapping[str, bytes], root: Path, tokens: Mapping[int, str], donors: Sequence[Donor]
) -> dict[str, bytes]:
    """Return a tokenizer's files with the pieces of others, behind all of its own tokens.

    Args:
        files: the contents of the tokenizer's files.
        root: the folder of the tokenizer.
        tokens: the tokens that it has, by the ids that a loader gives them.
        donors: the tokenizers with further pieces.

    Raises:
        OutlierMergeError: tokenizers are not of one kind, so that pieces of one mean nothing to the
            other.
    """
    tokenizer = json.loads(files[TOKENIZER])
    model = tokenizer["model"]
    others = [(donor, read_json(donor.root / TOKENIZER)) for donor in donors]
    _check_kinds(root, tokenizer, others)
    if isinstance(model["vocab"], list):
        _add_scored(model["vocab"], tokens, others)
    else:
        words: dict[str, int] = model["vocab"]
        for id_, token in tokens.items():
            words.setdefault(token, id_)
        first = max([*tokens, *words.values()], default=-1) + 1
        pieces = [piece for donor in donors for piece in donor.pieces]
        words |= {piece: first + place for place, piece in enumerate(pieces)}
        if "merges" in model:
            model["merges"] = _all_merges([tokenizer, *(other for _, other in others)], words)
    return {**files, TOKENIZER: json.dumps(tokenizer, ensure_ascii=False).encode()}


def _add_scored(
    pairs: list[Any], tokens: Mapping[int, str], others: Sequence[tuple[Donor, Mapping[str, Any]]]
) -> None:
    """Add pieces to a Unigram model, in which a piece's place is its id."""
    low = min((score for _, score in pairs), default=0.0) - 10
    # Added tokens keep their ids; the score keeps the model from cutting text into them.
    pairs += [[tokens[id_], low] for id_ in range(len(pairs), max(tokens, default=-1) + 1)]
    for donor, other in others:
        scores = dict(other["model"]["vocab"])
        pairs += [[piece, scores.get(piece, low)] for piece in donor.pieces]


def _all_merges(tokenizers: Sequence[Mapping[str, Any]], words: Mapping[str, int]) -> list[Any]:
    """Return the merges of BPE models, the first model's first, in the form that it has."""
    merges: dict[tuple[str, str], None] = {}
    for tokenizer in tokenizers:
        for left, right in _merges(tokenizer):
            if left in words and right in words and left + right in words:
                merges.setdefault((left, right))
    as_text = all(isinstance(merge, str) for merge in tokenizers[0]["model"]["merges"])
    if as_text and not any(" " in part for pair in merges for part in pair):
        return [f"{left} {right}" for left, right in merges]
    return [list(pair) for pair in merges]


def _merges(tokenizer: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for merge in tokenizer["model"].get("merges") or []:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _check_kinds(
    root: Path, tokenizer: Mapping[str, Any], others: Sequence[tuple[Donor, Mapping[str, Any]]]
) -> None:
    own = kind_of_tokenizer(tokenizer)
    unlike = []
    without = [d.root for d, _ in others if not is_there(d.root / TOKENIZER)]
    for donor, other in others:
        named = f"{shown(donor.name)}, which alone has {quoted(donor.pieces[0])}" + (
            f" and {len(donor.pieces) - 1:,} more" if len(donor.pieces) > 1 else ""
        )
        if donor.root in without:
            unlike.append(f"{named}: has no {TOKENIZER}")
        elif (kind := kind_of_tokenizer(other)) != own:
            unlike.append(f"{named}: {kind}")
    if unlike:
        raise OutlierMergeError(
            f"a union of tokenizers needs a {TOKENIZER} of one kind from each; the one of {root} "
            f"is {own}:\n{listing(unlike, limit=5)}\n"
            f"`tokenizer: {{source: base}}` leaves these tokens out; {TRANSPLANT}."
            + "".join(f" {how_to_convert(bare)}" for bare in without[:1])
        )


def kind_of_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    """Return the kind of a tokenizer: its model, and what its pieces are written in."""
    model = tokenizer.get("model") or {}
    kind = model.get("type")
    if kind is None:  # as tokenizers before 0.9 wrote them
        kind = "BPE" if "merges" in model else "Unigram" if _is_list(model) else "WordPiece"
    in_bytes = kind == "BPE" and any(
        '"ByteLevel"' in json.dumps(tokenizer.get(part)) for part in ("pre_tokenizer", "decoder")
    )
    prefix = model.get("continuing_subword_prefix") if kind == "WordPiece" else None
    return ("byte-level " if in_bytes else "") + kind + (f" with {prefix}" if prefix else "")


def no_union(roots: Iterable[Path]) -> str:
    """Return what to do about tokenizers of several kinds; empty if they have a union."""
    kinds = {
        kind_of_tokenizer(read_json(root / TOKENIZER))
        for root in roots
        if is_there(root / TOKENIZER)
    }
    if len(kinds) < 2:
        return ""
    said = f"as tokenizers of different kinds ({', '.join(sorted(kinds))}) have no union"
    return f"{TRANSPLANT}, {said}"


def _is_list(model: Mapping[str, Any]) -> bool:
    return isinstance(model.get("vocab"), list)
