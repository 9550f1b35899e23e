"""What the tokens of tokenizers of different kinds spell, so that equal ones are found.

A byte-level tokenizer writes the word " a" as `Ġa`, one of SentencePiece as `▁a`, WordPiece as `a`
(and what goes on within a word as `##a`). Single bytes are letters for the first (`Ċ` is a line
break), and pieces of their own for the second (`<0x0A>`).
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from outliermerge.checkpoint.config import read_json
from outliermerge.planning.special_tokens import special_token
from outliermerge.planning.tokenizer_files import TOKENIZER, added_entries
from outliermerge.planning.tokenizer_pieces import kind_of_tokenizer
from outliermerge.storage.stamps import is_there

_ROLES = ("eos", "bos", "unk", "pad", "sep", "cls", "mask")
"""In the order in which they count where a token has several: one that begins and ends texts is
matched with the token that ends them."""
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>$")
_SPACE = "▁"
_WITHIN_WORD = "##"


@cache
def _letters() -> dict[int, str]:
    """Return the letter of each byte in byte-level tokenizers, which is GPT-2's."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    return {byte: chr(byte) for byte in own} | {b: chr(256 + n) for n, b in enumerate(others)}


@cache
def _bytes() -> dict[str, int]:
    return {letter: byte for byte, letter in _letters().items()}


@dataclass(frozen=True)
class Spelled:
    """The tokens of a model by what they spell.

    Attributes:
        kind: `bytes`, `words` (WordPiece) or `spaces` (SentencePiece, and all others).
        ids: of all tokens that have a row.
        special: the special tokens among them.
        texts: by id what an ordinary token spells.
        single: by id the byte of a token that stands for a byte without a text.
        roles: the special tokens by what they are for: `eos`, `bos` …
        added: the tokens that were added to the tokenizer's own pieces, special or not.
    """

    kind: str
    ids: Mapping[str, int]
    special: frozenset[str]
    texts: Mapping[int, bytes]
    single: Mapping[int, int]
    roles: Mapping[str, str] = field(default_factory=dict)
    added: frozenset[str] = frozenset()

    def write(self, text: bytes) -> str:
        """Return a text as this tokenizer's model reads it.

        Raises:
            UnicodeDecodeError: the bytes are no text, and the tokenizer has no letters for them.
        """
        if self.kind == "bytes":
            return "".join(_letters()[byte] for byte in text)
        decoded = text.decode()
        if self.kind == "words":
            return decoded.removeprefix(" ")
        return decoded.replace(" ", _SPACE)

    def text_of(self, id_: int, token: str) -> str:
        """Return what a token spells, for people; bytes that are no text are `<0xE0>`."""
        spelt = self.texts.get(id_, token.encode("utf-8", "surrogatepass"))
        try:
            return spelt.decode()
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in spelt)

    def byte_ids(self, text: bytes) -> list[int]:
        """Return the tokens of a text's single bytes; empty if one of them has none."""
        own = {byte: id_ for id_, byte in self.single.items()}
        return [own[byte] for byte in text] if all(byte in own for byte in text) else []


def spelled(root: Path, tokens: Mapping[int, str]) -> Spelled:
    """Return what a tokenizer's tokens spell.

    Args:
        root: the folder of its files.
        tokens: those of its tokens that have a row, by id.
    """
    kind = _kind(root, frozenset(tokens.values()))
    entries = added_entries(root)
    named = ((role, special_token(root, f"{role}_token")) for role in _ROLES)
    roles = {role: token for role, token in named if token is not None}
    special = {token for token, entry in entries.items() if entry["special"]} | {*roles.values()}
    if kind == "spaces":  # bytes are bytes, also where a file lists them as special
        special = {token for token in special if not _BYTE.match(token)}
    texts: dict[int, bytes] = {}
    single: dict[int, int] = {}
    for id_, token in tokens.items():
        if token in special:
            continue
        if kind == "spaces" and (byte := _BYTE.match(token)):
            single[id_] = int(byte[1], 16)
        elif token in entries:
            texts[id_] = token.encode("utf-8", "surrogatepass")
        else:
            texts[id_] = _text(token, kind)
    ids = {token: id_ for id_, token in tokens.items()}
    return Spelled(
        kind, ids, frozenset(special & ids.keys()), texts, single, roles, frozenset(entries)
    )


def _kind(root: Path, tokens: Container[str]) -> str:
    if is_there(root / TOKENIZER):
        said = kind_of_tokenizer(read_json(root / TOKENIZER))
        if said.startswith("byte-level"):
            return "bytes"
        return "words" if said == f"WordPiece with {_WITHIN_WORD}" else "spaces"
    if all(letter in tokens for letter in _bytes()):  # of tiktoken, or GPT-2's older files
        return "bytes"
    return "words" if is_there(root / "vocab.txt") else "spaces"


def _text(token: str, kind: str) -> bytes:
    if kind == "bytes" and all(letter in _bytes() for letter in token):
        return bytes(_bytes()[letter] for letter in token)
    if kind == "words":
        is_within = token.startswith(_WITHIN_WORD) and token != _WITHIN_WORD
        token = token.removeprefix(_WITHIN_WORD) if is_within else f" {token}"
    return token.replace(_SPACE, " ").encode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class Pairing:
    """Which of a model's tokens the tokens of a donor are.

    Attributes:
        rows: by id of the donor's token the row of the same token in the model.
        shared: of them (id in the donor, row in the model) those that both spell alike: others are
            single bytes and special tokens.
        by_role: ids of special tokens that have another name in the model.
    """

    rows: Mapping[int, int]
    shared: Sequence[tuple[int, int]]
    by_role: Sequence[int]


def pair_tokens(model: Spelled, donor: Spelled) -> Pairing:
    """Find the tokens of a donor in a model.

    Special tokens are the same if they have one name, or else if they are for the same: both end a
    text, say. An added token is the same as a special one of its name. Ordinary ones are the same
    if they spell the same; of several that do, the one of the same name. A token for a byte is the
    same as the letter of this byte, unless the model has a token that spells it.
    """
    texts: dict[bytes, int] = {}
    for id_, text in model.texts.items():
        texts.setdefault(text, id_)
    single = {byte: id_ for id_, byte in model.single.items()}
    rows: dict[int, int] = {}
    shared, by_role = [], []
    for token, id_ in sorted(donor.ids.items(), key=lambda pair: pair[1]):
        if token in donor.special:
            if token in model.ids:
                rows[id_] = model.ids[token]
            elif (other := _same_role(token, donor, model)) is not None:
                rows[id_] = other
                by_role.append(id_)
        elif id_ in donor.single:
            byte = donor.single[id_]
            found = single.get(byte, texts.get(bytes([byte])))
            if found is not None:
                rows[id_] = found
        elif token in donor.added and token in model.special:
            rows[id_] = model.ids[token]
        elif (text := donor.texts[id_]) in texts:
            own = model.ids.get(token, -1)
            rows[id_] = own if model.texts.get(own) == text else texts[text]
            shared.append((id_, rows[id_]))
        elif len(text) == 1 and text[0] in single:
            rows[id_] = single[text[0]]
    return Pairing(rows, shared, by_role)


def _same_role(token: str, donor: Spelled, model: Spelled) -> int | None:
    """Return the model's token that is for the same as a special token of the donor."""
    for role in _ROLES:
        other = model.roles.get(role)
        if donor.roles.get(role) == token and other is not None and other in model.ids:
            return model.ids[other]
    return None
