"""The files that list a tokenizer's vocabulary, other than tokenizer.json: the token of each id."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from outliermerge.errors import quoted
from outliermerge.storage.json_text import parse_json

MAX_TOKENS = 1 << 21
"""More tokens than any tokenizer has. Tables of rows are made for all ids, and fill the memory."""

_MAX_PIECE = 1 << 16  # bytes; loaders take minutes for pieces that are much longer
_RANKS = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
_NUM_SENTINELS = 100  # of a T5 tokenizer whose config does not say it


def json_object(data: bytes) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        ValueError: it is none.
    """
    value = parse_json(data, unique=False)
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    return value


def by_id(ids: Mapping[str, Any]) -> dict[int, str]:
    """Return tokens by id, from ids by token.

    Raises:
        ValueError: an id is none.
    """
    return dict(checked((id_, token)) for token, id_ in ids.items())


def checked(pair: tuple[Any, Any]) -> tuple[int, str]:
    """Return an id and its token.

    Raises:
        ValueError: the id is no whole number from 0 on, or too large, or the token is no text.
    """
    id_, token = pair
    if type(id_) is not int or id_ < 0 or not isinstance(token, str):
        raise ValueError(f"{quoted(token)} with id {quoted(id_)} is not a token")
    if id_ >= MAX_TOKENS:
        raise ValueError(f"{quoted(token)} has the id {id_:,}, expected ids below {MAX_TOKENS:,}")
    return id_, token


def _refuse_more(number: int) -> None:
    if number >= MAX_TOKENS:
        raise ValueError(f"it has {MAX_TOKENS:,} tokens or more")


def _token_ids(data: bytes) -> dict[int, str]:
    return by_id(json_object(data))


def _lines(data: bytes) -> dict[int, str]:
    _refuse_more(data.count(b"\n"))
    lines = data.decode("utf-8").replace("\r\n", "\n").split("\n")
    return dict(enumerate(lines if lines[-1] else lines[:-1]))


def is_tiktoken(name: str, data: bytes) -> bool:
    """Tell whether a vocabulary file, by its name and content, is one of tiktoken."""
    return name.endswith(TIKTOKEN) or name == "tiktoken.model" or bool(_RANKS.match(data))


def _model(data: bytes) -> dict[int, str]:
    """Return the tokens of a tokenizer.model, which is one of SentencePiece or of tiktoken."""
    return _ranks(data) if _RANKS.match(data) else dict(enumerate(_pieces(data)))


def _ranks(data: bytes) -> dict[int, str]:
    """Return the tokens of a tiktoken file, which has a line for each: its bytes, and its id.

    A token is written as in a byte-level tokenizer.json, with a sign for each byte.
    """
    _refuse_more(data.count(b"\n"))
    tokens: dict[int, str] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        token, _, id_ = line.partition(b" ")
        try:
            raw = base64.b64decode(token, validate=True)
            tokens.update([checked((int(id_), "".join(map(_SIGNS.__getitem__, raw))))])
        except ValueError as error:
            raise ValueError(f"no tiktoken file: line {number}: {error}") from error
    return tokens


def _byte_signs() -> list[str]:
    """Return the sign of each byte: itself if it can be seen, else the next from U+0100 on.

    >>> _byte_signs()[32], _byte_signs()[65]
    ('Ġ', 'A')
    """
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]


_SIGNS = _byte_signs()


def _pieces(data: bytes) -> list[str]:
    """Return the pieces of a sentencepiece model in order.

    A ModelProto repeats `pieces` as field 1; a piece's text is its field 1
    (github.com/google/sentencepiece, src/sentencepiece_model.proto).
    """
    pieces: list[str] = []
    for number, value in _fields(data):
        if number == 1:
            texts = [text for inner, text in _fields(value) if inner == 1]
            if not texts:
                raise ValueError(f"piece {len(pieces)} has no text")
            if len(texts[-1]) > _MAX_PIECE:
                raise ValueError(
                    f"piece {len(pieces)} has {len(texts[-1]):,} bytes, expected at most "
                    f"{_MAX_PIECE:,}"
                )
            pieces.append(texts[-1].decode("utf-8"))
            _refuse_more(len(pieces))
    if not pieces:
        raise ValueError("no sentencepiece model: it has no pieces")
    return pieces


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the bytes of a message's length-delimited fields.

    The wire format is described at protobuf.dev/programming-guides/encoding: varints (0), 8 bytes
    (1), a length and that many bytes (2), 4 bytes (5). sentencepiece models have no groups (3, 4).
    """
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            _, position = _varint(data, position)
            continue
        if wire_type == 2:
            length, position = _varint(data, position)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"no sentencepiece model: wire type {wire_type} at byte {position}")
        if position + length > len(data):
            raise ValueError("no sentencepiece model: it ends within a field")
        if wire_type == 2:
            yield number, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("no sentencepiece model: it ends within a number")
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError("no sentencepiece model: a number is too long")


def _as_numbered(pieces: list[str], _: Mapping[str, Any]) -> list[str]:
    return pieces


def _with_sentinels(pieces: list[str], config: Mapping[str, Any]) -> list[str]:
    """Return the tokens of a T5 tokenizer: its sentinels come behind the pieces, the last first."""
    said = config.get("extra_ids", _NUM_SENTINELS)
    if type(said) is not int or not 0 <= said < MAX_TOKENS:
        raise ValueError(f"extra_ids of tokenizer_config.json is {quoted(said)}")
    return [*pieces, *(f"<extra_id_{number}>" for number in reversed(range(said)))]


def _as_fairseq(pieces: list[str], _: Mapping[str, Any]) -> list[str]:
    """Return the tokens of an XLM-R tokenizer, which has other special tokens than its pieces."""
    return ["<s>", "<pad>", "</s>", "<unk>", *pieces[3:], "<mask>"]


READERS: Mapping[str, Callable[[bytes], dict[int, str]]] = {
    "vocab.json": _token_ids,
    "vocab.txt": _lines,
    "tokenizer.model": _model,
    "tiktoken.model": _ranks,
}
"""What reads the tokens of a file whose ids do not depend on the tokenizer's class."""

TIKTOKEN = ".tiktoken"

_BY_CLASS: Mapping[tuple[str, str], Callable[[list[str], Mapping[str, Any]], list[str]]] = {
    ("spiece.model", "T5Tokenizer"): _with_sentinels,
    ("spiece.model", "MT5Tokenizer"): _with_sentinels,
    ("spiece.model", "AlbertTokenizer"): _as_numbered,
    ("spiece.model", "XLNetTokenizer"): _as_numbered,
    ("sentencepiece.bpe.model", "XLMRobertaTokenizer"): _as_fairseq,
}
_SPECIAL: Mapping[str, Mapping[str, str]] = {
    "T5Tokenizer": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "XLNetTokenizer": {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "<sep>",
        "pad_token": "<pad>", "cls_token": "<cls>", "mask_token": "<mask>",
    },
}  # fmt: skip
NUMBERED_BY_CLASS = tuple(dict.fromkeys(name for name, _ in _BY_CLASS))
"""Files whose pieces get other ids from other tokenizers."""


def is_known(name: str, config: Mapping[str, Any]) -> bool:
    """Tell whether it is known which ids a tokenizer gives the pieces of such a file.

    Args:
        config: of the tokenizer.
    """
    return (name, _class_in(config)) in _BY_CLASS


def special_of_class(name: str, config: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the special tokens that a tokenizer of such a file has if its config names none."""
    return _SPECIAL.get(_class_in(config), {}) if name in NUMBERED_BY_CLASS else {}


def _class_in(config: Mapping[str, Any]) -> str:
    return str(config.get("tokenizer_class")).removesuffix("Fast")


def read_vocabulary(name: str, data: bytes, config: Mapping[str, Any]) -> dict[int, str]:
    """Return the token of each id in the content of a vocabulary file.

    Args:
        name: of the file.
        config: of the tokenizer.

    Raises:
        ValueError: the content is not what the name says.
    """
    if name in NUMBERED_BY_CLASS:
        return dict(enumerate(_BY_CLASS[name, _class_in(config)](_pieces(data), config)))
    return _ranks(data) if name.endswith(TIKTOKEN) else READERS[name](data)
